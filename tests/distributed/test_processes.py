"""Several processes on one machine train the language model, are killed, and go on as others."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "--methods": "GDMAM",
    "--steps": 6,
    "--width": 16,
    "--layers": 1,
    "--heads": 2,
    "--batch": 12,
    "--context": 8,
    "--print-every": 1,
    "--save-every": 2,
}


def launch(number, *flags, missing=0):
    """Starts ``number`` processes, or all of them but the last ``missing``."""
    environment = {
        name: value for name, value in os.environ.items() if "proxy" not in name.lower()
    } | {"JAX_PLATFORMS": "cpu"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment["JAX_COORDINATOR_BIND_ADDRESS"] = address
    small = [str(word) for flag in SMALL.items() for word in flag]
    together = [
        ("--coordinator", address, "--num-processes", str(number), "--process-id", str(i))
        for i in range(number - missing)
    ]
    return [
        subprocess.Popen(
            [sys.executable, ROOT / "examples" / "language_model.py", *small, *flags, *own],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own in together
    ]


def finish(processes, seconds=280):
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def metrics(output):
    """What was printed of each step: {step: [alignment, cosine, prediction]}."""
    return {
        int(step): [float(number) for number in re.findall(r" (-?\d\.\d+),", rest)]
        for step, rest in re.findall(r"step (\d)/6(.*)", output)
    }


def test_killed_training_goes_on_with_another_number_of_processes(tmp_path):
    checkpoints = ("--checkpoints", str(tmp_path))
    killed = launch(2, *checkpoints, "--fsdp")
    lines = []
    for line in killed[0].stdout:
        lines.append(line)
        if "step 5/6" in line:
            break
    for process in killed:
        process.send_signal(signal.SIGKILL)
    finish(killed)
    assert "step 5/6" in lines[-1], "".join(lines)

    outputs = finish(launch(3, *checkpoints))
    print("".join(lines), *outputs, sep="\n")
    resumed = re.findall(r"going on from step (\d)", outputs[0])
    assert resumed in (["2"], ["4"])
    ends = [re.findall(r"process (\d) of 3 ends with state (\w+)", text) for text in outputs]
    assert [end[0][0] for end in ends] == ["0", "1", "2"]
    assert len({end[0][1] for end in ends}) == 1, "the processes' states differ"

    before, after = metrics("".join(lines)), metrics(outputs[0])
    for step in set(before) & set(after):
        assert after[step] == pytest.approx(before[step], abs=2e-3), f"step {step}"
    assert len(after[5]) == 3
    assert max(after) == 6


def test_a_missing_process_is_named_in_a_clear_error():
    process = launch(2, "--wait", "1", missing=1)
    (output,) = finish(process)
    assert process[0].returncode == 1
    assert "Process 0 of 2: not all processes met at 127.0.0.1:" in output
    assert "within 1 s" in output
