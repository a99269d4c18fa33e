"""README and pages: links, anchors, numbers, and rows of tables that name what is tested."""

import ast
import importlib
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.image import imread

import gdmam_jax as gdmam
from benchmarks.physics.equations import EQUATIONS
from conftest import WHOLE_PAGES
from docs import figures, pages
from tests.mutants import MUTANTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.rglob("*.md"), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY"))]
)
NAVIGATION = re.findall(r"^ +- .*: (\S+\.\w+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


def prose(page):
    """A page without code, in which brackets mean something else."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^--8<-- \"(.+)\"$", lambda match: (ROOT / match[1]).read_text(), text)
    return text


def wording(page):
    """A page's words on one line, without emphasis."""
    return " ".join(page.read_text().replace("*", "").split())


def anchors(page):
    """The headings of a page as Python-Markdown's `toc` and GitHub name them, and ids."""
    text = prose(page)
    found = set(re.findall(r'\bid="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading))
        found.add(re.sub(r"[-\s]+", "-", plain.strip().lower()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"`[^`\n]*`", "code", prose(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file() or (target.is_dir() and page.parent == ROOT), link
        # What is not in `docs` is not on the site.
        assert page.parent == ROOT or target.absolute().is_relative_to(DOCS), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r'srcset="(?:\.\./)*([^"]+)"', text):  # for narrow screens
        assert (DOCS / name).is_file(), name
    for name in re.findall(r"\]\[gdmam_jax\.(\w+)\]", prose(page)):
        assert hasattr(gdmam, name), name


@pytest.mark.parametrize("name", WHOLE_PAGES)
def test_blocks_that_go_on_from_one_another_run(name):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{name}.md").read_text(), re.M | re.S)
    assert len(blocks) > 1
    namespace: dict = {"__name__": name}
    for block in blocks:
        exec(compile(block, f"docs/{name}.md", "exec"), namespace)


def test_every_page_is_in_the_navigation_once():
    notebooks = [f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")]
    written = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(NAVIGATION) == sorted(written + notebooks)


def test_llms_txt_names_the_pages():
    named = re.findall(r"\]\((\S+)\)", (DOCS / "llms.txt").read_text())
    names = [
        name.removesuffix(".md").removesuffix("/index") for name in NAVIGATION if name != "index.md"
    ]
    assert sorted(named) == sorted(f"{name}/" for name in names)


def test_notebooks_open_in_colab_where_the_package_and_the_repository_are_published():
    addresses = ("https://github.com/owner/name", "https://github.com/owner/name.git")
    for address in addresses:
        assert (
            "[Open in Colab](https://colab.research.google.com/github/owner/name/blob/main/"
            "notebooks/first_training.ipynb)"
        ) in pages.opening("first_training", address, on_pypi=True)
    for address in (None, "", "https://git.example/owner/name"):
        told = pages.opening("first_training", address, on_pypi=True)
        assert "Upload notebook" in told
        assert "(first_training.ipynb)" in told
        assert "Open in Colab" not in told
    for address in (None, *addresses):
        told = pages.opening("first_training", address, on_pypi=False)
        assert "of a clone" in told
        assert "Colab" not in told


def test_no_page_installs_from_an_index_what_is_not_on_it():
    promised = re.compile(r"pip install[^\n]*[\s\"\'`]gdmam-jax(?!/)")
    texts = [*PAGES, DOCS / "llms.txt", *(ROOT / "examples").glob("*.py")]
    found = [path.name for path in texts if promised.search(path.read_text())]
    assert pages.ON_PYPI or not found


def test_links_to_notebooks_lead_to_their_pages():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="examples.md"))
    text = pages.on_page_markdown((DOCS / "examples.md").read_text(), page)
    linked = set(re.findall(r"\]\((notebooks/\w+\.md)\)", text))
    assert linked == {name for name in NAVIGATION if name.startswith("notebooks/")}


def test_the_gallery_has_every_example_with_its_command():
    text = (DOCS / "examples.md").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        if path.stem not in ("training", "comparing"):  # what several of them share
            assert f"python examples/{path.name}" in text, path.name


def test_long_names_break_behind_signs_only():
    content = "<code>a_b(c=0.5, d.e) --f-g</code> <pre><code>a_b\nc_d</code></pre>"
    assert pages.on_page_content(content) == (
        '<code>a_<wbr>b(<wbr>c=<wbr>0.5, d.e) <span class="option">--f-g</span></code> '
        "<pre><code>a_b\nc_d</code></pre>"
    )


def test_numbers_stay_whole_and_pictures_open_in_full():
    kept = '<a href="b"><img src="b"/></a> <pre>1e-5</pre> <img alt="1e-5"/>'
    assert pages.on_page_content(f'1.3e-05 <img alt="" src="a.png"/> {kept}') == (
        '<span class="option">1.3e-05</span> <a href="a.png"><img alt="" src="a.png"/></a> ' + kept
    )


def test_nothing_is_loaded_from_elsewhere():
    settings = (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"^  font: false$", settings, re.MULTILINE)
    own = [path for path in DOCS.rglob("*") if path.suffix in (".css", ".html", ".js")]
    for text in [settings, *(path.read_text() for path in own)]:
        assert not re.findall(r"https?://\S+", text)


def test_the_api_has_every_public_name_on_one_page():
    assert [f"api/{page}.md" for page in ("index", *figures.API)] == [
        name for name in NAVIGATION if name.startswith("api/")
    ]
    text = "".join((DOCS / "api" / f"{page}.md").read_text() for page in figures.API)
    named = re.findall(r'^    "(\w+)",$', text, re.MULTILINE)
    modules = {"nnx", "plotting", "ldl"}
    public = {name for name in vars(gdmam) if not name.startswith("_")} - modules
    assert sorted(named) == sorted(public)
    assert sorted(re.findall(r"^::: gdmam_jax\.(\w+)$", text, re.MULTILINE)) == sorted(modules)
    assert all(figures.docstrings()[name].endswith((".", ")", ":")) for name in named)
    listed = re.findall(r"\[gdmam_jax\.(\w+)\]", figures.api_table())
    assert sorted(listed) == sorted(public)


def test_figures_of_the_pages_are_in_their_files():
    jinja2 = pytest.importorskip("jinja2")
    macros = {}

    class Environment:
        def macro(self, function):
            macros[function.__name__] = function

    figures.define_env(Environment())
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    rendered = 0
    for page in DOCS.rglob("*.md"):
        text = page.read_text()
        if text.startswith("---\nrender_macros: true\n---"):
            environment.from_string(text).render(**macros)
            rendered += 1
        else:
            assert not re.search(rf"{{{{ ({'|'.join(macros)})\(", text), page
    assert rendered >= 2
    with pytest.raises(ValueError, match=r"one row of update.json with .*'adam'.*, found 0"):
        figures.figure("update", "moved", optimizer="adam")


@pytest.mark.parametrize("path", sorted(DOCS.glob("figures/*.json")), ids=lambda path: path.stem)
def test_contributing_has_the_command_of_every_file_of_figures(path):
    table = (ROOT / "CONTRIBUTING.md").read_text()
    [told] = re.findall(rf"^\| `docs/figures/{path.name}` \| `([^`]+)` \|", table, re.MULTILINE)
    measured = figures.read(path.stem)
    if path.stem == "burgers":  # What an example writes: errors, of each method one for each seed.
        command = f"python examples/burgers.py --seeds {len(measured['GDMAM'])}"
    else:
        command = measured["command"]
    # Which the file has where a shell needs them.
    told, command = (re.sub("[\"']", "", each) for each in (told, command))
    # Where pieces of a long run are kept, and where its data are, is one's own affair.
    assert told == re.sub(r" --(out|data-folder) \S+", "", command) or told.startswith(
        f"{command} --output"
    )


def test_mean_ranks_are_over_the_equations_that_all_methods_were_run_on(tmp_path, monkeypatch):
    runs = {
        "heat": {"gdmam": (0.1, 0.2, 0.3), "summed": (0.4, 0.1, 0.6)},
        "wave": {"gdmam": (0.2, 0.9, 0.7), "summed": (0.1, 0.1, 0.1)},
        "burgers": {"gdmam": (0.1,)},
    }
    lines = ["equation,method,extras,steps,rate,seed,error"] + [
        f"{equation},{method},{extras},5000,0.01,{seed},{error}"
        for equation, found in runs.items()
        for method, errors in found.items()
        for seed, error in enumerate(errors)
        for extras in ("", "causal")
    ]
    (tmp_path / "made.csv").write_text("\n".join(lines))
    monkeypatch.setattr(figures, "DOCS", tmp_path)
    table = figures.physics_table("made", ["gdmam", "summed"], list(runs)).splitlines()
    assert table[-4:] == [
        "| failed | 2 | 1 |",
        "| worst over best | 7.0 | 2.0 |",
        "| mean rank | 1.5 | 1.5 |",
        "| lowest or level | 1 of 2 | 2 of 2 |",
    ]
    assert table[4].endswith("| not run |")


def test_the_readmes_table_of_kinds_is_that_of_the_runs():
    assert figures.kinds_short_table() in (ROOT / "README.md").read_text()
    for table in (figures.kinds_table(), figures.kinds_table(sums=True)):
        header, _, *rows = (line.split(" | ") for line in table.splitlines())
        assert len(rows) == len(figures.kinds())
        assert {len(row) for row in rows} == {len(header)}


@pytest.mark.parametrize("page", ["README", "docs/index", "docs/defaults", "docs/physics_choices"])
def test_the_result_on_physics_is_that_of_its_runs_and_worded_alike(page):
    text = wording(ROOT / f"{page}.md")
    medians = {
        method: {equation: statistics.median(errors) for equation, errors in found.items()}
        for method, found in figures.physics().items()
    }
    ours = medians["gdmam"]
    equations = [name for name in ours if all(name in found for found in medians.values())]
    without_factor = [found for name, found in medians.items() if not name.startswith("data x")]
    lowest = sum(ours[name] <= min(each[name] for each in without_factor) for name in equations)
    ratios = sorted(ours[name] / medians["summed"][name] for name in equations)
    third = sum(3 * ratio < 1 for ratio in ratios)
    numbers = (
        "none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    )  # fmt: skip
    assert (
        f"lowest median error of the methods without a factor to tune on {numbers[lowest]} of "
        f"{numbers[len(equations)]} equations"
    ) in text
    assert (
        f"less than a third of that of Adam on the sum on {numbers[third]} of the "
        f"{numbers[len(equations)]}, {ratios[third]:.2f} to {ratios[-1]:.2f} of it on the others"
    ) in text
    assert all(ours[name] < medians["config"][name] for name in equations)


def test_the_result_with_one_momentum_is_that_of_its_runs():
    slower = [f"{name} b1 0.95" for name in ("summed", "pcgrad", "imtl-g", "config")]
    usual = ["summed", "pcgrad", "imtl-g", "config", "m-config"]
    found = figures.physics(methods=["gdmam", "adamw allocated", *slower, *usual])

    def lowest(ours, others):
        names = [name for name in found[ours] if all(found[other][name] for other in others)]
        medians = {
            method: [statistics.median(found[method][name]) for name in names]
            for method in (ours, *others)
        }
        assert len(names) == 10
        return sum(min(each) == each[0] for each in zip(*medians.values(), strict=True))

    assert lowest("gdmam", slower) == 9
    assert lowest("adamw allocated", usual) == 4
    text = wording(ROOT / "docs/physics_choices.md")
    assert "lowest median on nine of the ten" in text
    assert "lowest median on four of the ten" in text


def test_the_count_on_the_page_on_physics_is_that_of_its_table():
    text = (DOCS / "physics.md").read_text()
    methods = re.search(r"physics_table\(methods=(\[.*?\]),\s+times", text, re.DOTALL)[1]
    table = figures.physics_table(methods=(names := ast.literal_eval(methods))).splitlines()
    [row] = [line.strip("| ").split(" | ") for line in table if line.startswith("| lowest or l")]
    counts = dict(zip(names, row[1:], strict=True))
    plain = wording(DOCS / "physics.md")
    assert f"SOAP behind it is lowest or level on {counts['soap allocated']} equations" in plain
    assert f"Muon behind the allocation is lowest or level on {counts['muon allocated']};" in plain


def test_the_counts_of_failed_runs_of_each_optimizer_are_those_of_its_tables():
    ways = ("summed", "gradient norms", "allocated")
    failed = {way: [] for way in ways}
    clear = {"gradient norms": [], "allocated": []}
    for optimizer in ("adamw", "muon", "soap"):
        runs = [
            figures.physics(methods=[f"{optimizer} {way}"])[f"{optimizer} {way}"] for way in ways
        ]
        errors = {
            equation: dict(zip(ways, each, strict=True))
            for equation, *each in ((name, *(found[name] for found in runs)) for name in runs[0])
            if all(each)
        }
        assert len(errors) == 18
        hard = {"allen-cahn", "korteweg-de-vries", "kuramoto-sivashinsky"}
        for way in ways:
            failed[way].append(
                sum(e > figures.FAILED for name in set(errors) - hard for e in errors[name][way])
            )
        for each in errors.values():
            for *others, ours in zip(*each.values(), strict=True):
                assert ours <= figures.FAILED or min(others) > figures.FAILED
        for way, other in (("allocated", "gradient norms"), ("gradient norms", "allocated")):
            clear[way].append(sum(max(each[way]) < min(each[other]) for each in errors.values()))
    text, first = (wording(DOCS / f"{page}.md") for page in ("physics_optimizers", "physics"))
    norms, ours = failed["gradient norms"], failed["allocated"]
    assert (
        f"{norms[0]} of AdamW's runs fail with gradient norms, {norms[1]} of Muon's and "
        f"{norms[2]} of SOAP's. Behind the allocation {ours[0]}, {ours[1]} and {ours[2]} fail."
    ) in text
    summed = failed["summed"]
    assert (
        f"{summed[0]} of AdamW's runs, {summed[1]} of Muon's and {summed[2]} of SOAP's fail on the "
        f"sum, and behind the allocation {ours[0]}, {ours[1]} and {ours[2]}."
    ) in first
    assert clear == {"gradient norms": [0, 0, 0], "allocated": [6, 4, 2]}


@pytest.mark.parametrize("page", ["README", "docs/physics", "docs/physics_optimizers"])
def test_the_error_in_jaxpis_configuration_is_that_of_its_run(page):
    text = wording(ROOT / f"{page}.md")
    methods = ("soap allocated", "soap gradient norms")
    runs = figures.physics("physics_jaxpi", methods, steps=20000)
    assert f"{100 * runs[methods[0]]['allen-cahn'][0]:.2g}%" in text
    if page != "docs/physics":
        assert f"{100 * runs[methods[1]]['allen-cahn'][0]:.2g}%" in text
    if page == "docs/physics_optimizers":
        assert all(f"{100 * runs[method]['burgers'][0]:.2g}%" in text for method in methods)


def test_every_equation_is_written_out():
    text = (DOCS / "physics_equations.md").read_text()
    rows = re.findall(r"^\| ([a-z][a-z0-9-]+) \| ", text, re.MULTILINE)
    assert sorted(row for row in rows if row != "name") == sorted(EQUATIONS)


def test_the_state_is_as_large_as_that_of_adamw():
    assert round(figures.row("update", optimizer="gdmam")["memory"], 2) == 1


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/questions.md"])
def test_times_in_sentences_are_those_of_the_files(page):
    text = wording(ROOT / page)
    measured = {
        "([Uu]pdate takes|Cost of an update \\|)": [
            figures.row("update", optimizer="gdmam")["over summed"]["median"],
            figures.row("update_losses", optimizer="gdmam", losses=2)["over summed"]["median"],
        ],
        "Two gradients take": [
            figures.row("pair", model=model, losses=2, way="JAX paired")["over summed"]["median"]
            for model in ("mlp", "resnet", "transformer")
        ],
    }
    found = 0
    for words, times in measured.items():
        for *_, low, high in re.findall(f"({words}) ([\\d.]+) to ([\\d.]+) times", text):
            # A tenth of rounding, and no more room than that.
            assert float(low) - 0.05 <= min(times) <= float(low) + 0.15, words
            assert float(high) - 0.15 <= max(times) <= float(high) + 0.05, words
            found += 1
    assert found == (2 if "questions" in page else 1)


def test_times_of_several_losses_are_those_of_the_file():
    text = (DOCS / "weightings.md").read_text()
    stated = re.search(r"update took ([\d.]+), ([\d.]+) and ([\d.]+) times", text).groups()
    for time, losses in zip(stated, (2, 3, 5), strict=True):
        update = figures.row("update_losses", optimizer="gdmam", losses=losses)
        assert float(time) == round(update["over summed"]["median"], 1)


@pytest.fixture
def script(request, tmp_path, monkeypatch):
    """A script that draws a picture, and that writes it into a temporary folder."""
    monkeypatch.syspath_prepend(DOCS)
    module = importlib.import_module(request.param)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "script.py"))
    monkeypatch.setattr(module, "HERE", tmp_path, raising=False)
    return module


# Fewer weightings and trainings than the scripts draw: each is compiled, which is what takes long.


@pytest.mark.parametrize("script", ["draw_weightings"], indirect=True)
def test_the_picture_of_weightings(script, tmp_path, monkeypatch):
    falls = {
        name: script.CONFLICT @ script.step_taken(method) for name, method in script.METHODS.items()
    }
    assert falls.pop("Sum")[0] < 0
    assert all((fall > 0).all() for fall in falls.values())
    assert max(falls, key=lambda name: falls[name][0]) == "GDMAM"
    kept = {name: script.WEIGHTINGS[name] for name in ("sum", "unit")}
    monkeypatch.setattr(script, "WEIGHTINGS", kept)
    script.main()
    for name in ("conflict", "conflict_narrow", "weightings", "weightings_narrow"):
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


@pytest.mark.parametrize("script", ["draw_trajectories"], indirect=True)
def test_the_picture_of_trajectories(script, tmp_path, monkeypatch, capsys):
    methods = script.methods()
    kept = ("Sum (Adam)", "GDMAM")
    monkeypatch.setattr(script, "methods", lambda: {name: methods[name] for name in kept})
    landscape = "One minimum"
    monkeypatch.setattr(script, "LANDSCAPES", {landscape: script.LANDSCAPES[landscape]})
    script.main()
    printed = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    page = (DOCS / "how_it_works.md").read_text()
    _, stated = re.search(rf"^\| {landscape}(: [^|]*)\| (.*) \|$", page, re.MULTILINE).groups()
    ends = dict(zip(methods, stated.split(" | "), strict=True))
    assert printed == [landscape, *(ends[name] for name in kept)]
    for name in ("trajectories.png", "trajectories_narrow.png"):
        assert imread(tmp_path / name).std() > 0.01


@pytest.mark.parametrize("script", ["draw_social"], indirect=True)
def test_the_social_picture(script, tmp_path):
    script.main()
    drawn, committed = (imread(path / "social.png") for path in (tmp_path, DOCS))
    assert drawn.shape == committed.shape == (640, 1280, 4)
    # Another version of the fonts moves letters; arrows and words are where they were.
    assert abs(drawn - committed).mean() < 0.5 * abs(1 - committed).mean()


def rows(page):
    """The first cells of every table of a page, but for headings."""
    lines = (DOCS / page).read_text().splitlines()
    return [
        line.split(" | ")[0].removeprefix("| ")
        for number, line in enumerate(lines)
        if line.startswith("| ")
        and not line.startswith("| ---")
        and not lines[min(number + 1, len(lines) - 1)].startswith("| ---")
    ]


COMPATIBILITY = {
    # Optax
    "`adamw`, `lion`, `sgd`, `adan`, `contrib.muon`, `contrib.schedule_free_adamw` behind "
    "`allocate`": (
        "test_allocate test_in_front_of_an_optimizer "
        "test_muon_sees_the_matrices_among_the_parameters"
    ),
    "`gdmam(rate)`": "test_allocate test_gdmam_is_adam_behind_allocate test_weighed_is_a_chain",
    "`lbfgs`, `scale_by_zoom_linesearch`, `scale_by_backtracking_linesearch`": (
        "test_allocate test_line_searches_get_the_function_whose_gradient_they_are_given "
        "test_the_function_has_the_allocated_gradient test_values_of_something_else_are_refused "
        "test_first_gdmam_then_lbfgs_with_its_last_weights_reaches_a_stationary_point "
        "test_a_line_search_hands_on_what_the_losses_are_given"
    ),
    "`polyak_sgd`": (
        "test_allocate test_polyak_steps_are_of_the_weighed_loss "
        "test_the_value_of_a_loss_that_is_left_out_does_not_count "
        "test_with_several_scopes_the_weighting_gets_the_values_and_the_optimizer_none"
    ),
    "`contrib.sam`": "test_allocate test_sam_climbs_along_both_gradients",
    "`chain`, `named_chain`": "test_optax test_chain test_named_chain",
    "`scale`, `clip`, `clip_by_block_rms`, `centralize`, `scale_by_sign` before": (
        "test_optax test_link_before"
    ),
    "`clip_by_global_norm` before": "test_optax test_clip_by_global_norm_before",
    "`add_noise` before": "test_optax test_add_noise_before",
    "`freeze` before": "test_optax test_freeze_before",
    "`clip_by_global_norm`, `adaptive_grad_clip`, `zero_nans`, `add_decayed_weights`, `freeze`, "
    "`flatten` behind": "test_optax test_link_after",
    "`ema` behind": "test_optax test_ema_after",
    "`add_noise` behind": "test_optax test_add_noise_after",
    "`contrib.reduce_on_plateau`": "test_optax test_reduce_on_plateau",
    "learning-rate schedules": "test_optax test_learning_rate_schedule",
    "`lookahead`": "test_optax test_lookahead",
    "`contrib.schedule_free`": "test_optax test_schedule_free",
    "`partition`": "test_optax test_partition",
    "`masked`": "test_optax test_masked test_masked_link_before",
    "`partition`, `masked`, another optimizer inside `over_pairs`": (
        "test_allocate test_a_wrapper_that_hands_leaves_to_others_is_refused"
    ),
    "`inject_hyperparams`": "test_optax test_inject_hyperparams_schedules_every_scalar",
    "`inject_hyperparams` of a weighting's setting": (
        "test_optax test_inject_hyperparams_every_scalar_matters"
    ),
    "`tree.map_params`": "test_optax test_map_params",
    "`tree.norm`, `tree.add`, `tree.scale`, `tree.cast`": (
        "test_optax_tree test_arithmetic_on_pairs_is_arithmetic_on_both_gradients "
        "test_states_are_ordinary_trees"
    ),
    "`tree.get`, `tree.set`": "test_optax_tree test_get_and_set_of_injected_numbers",
    "unknown extra arguments": "test_optax test_unknown_extra_arguments",
    "`update(gradients, state, params, alignment=others)`": (
        "test_optax test_alignment_gradients_by_keyword"
    ),
    "recompilation, dtypes, states under explicit sharding": (
        "test_contrib_behaviour test_no_recompilation_and_dtypes "
        "test_state_types_are_stable_under_explicit_sharding"
    ),
    "Optax's own tests of an optimizer": "test_contrib_behaviour test_convergence",
    "`MultiSteps`": "test_optax test_multi_steps",
    "`MultiSteps` with `skip_not_finite`": "test_optax test_skip_not_finite",
    "`apply_if_finite`": "test_optax test_apply_if_finite",
    "`zero_nans`, `adaptive_grad_clip`, `add_decayed_weights` before": (
        "test_optax test_link_before_over_pairs "
        "test_links_that_need_over_pairs_fail_at_once_without "
        "test_zero_nans_without_over_pairs_fails_in_a_scan"
    ),
    "`ema` before": "test_optax test_ema_before_over_pairs",
    "`contrib.mechanize`": "test_optax test_mechanize",
    "`alignment=` with `masked`, `partition` or links before GDMAM": (
        "test_optax test_alignment_gradients_by_keyword "
        "test_links_before_see_only_the_prediction_gradients_of_a_keyword_call"
    ),
    "a *function* as labels of `partition` or mask of `masked`": (
        "test_optax test_labels_by_a_function"
    ),
    "`flatten` around GDMAM": "test_optax test_flatten_says_why_not_and_what_to_do",
    "`inject_hyperparams` with half-precision parameters": (
        "test_optax test_injected_numbers_narrower_than_float32_are_refused"
    ),
    "`tree.get` of GDMAM's own numbers": (
        "test_optax_tree test_get_does_not_look_inside_dataclasses_but_diagnostics_does"
    ),
    # Flax
    "`gdmam_jax.nnx.value_and_paired_grad`": (
        "test_nnx test_state_advances_as_in_one_forward_pass test_gradients_are_those_of_each_loss"
    ),
    "`wrt` filters, such as LoRA": (
        "test_nnx test_wrt_differentiates_and_trains_only_what_it_chooses"
    ),
    "several modules, containers, shared `Rngs`, metrics as arguments": (
        "test_nnx test_several_arguments_in_any_order "
        "test_variables_and_containers_of_modules_are_arguments_too "
        "test_references_shared_between_arguments_stay_shared test_metrics_in_the_loss_function "
        "test_modules_and_variables_in_aux_are_the_same_objects"
    ),
    "attributes that the loss adds, replaces or removes": (
        "test_nnx test_structure_changes_are_kept"
    ),
    "`nnx.Optimizer`": "test_flax_nnx test_optimizer_goes_the_way_of_plain_parameters",
    "graph mode and tree mode of NNX": "test_nnx test_training_learns_and_compiles_once",
    "`nnx.split` once, `jax.jit`, `nnx.merge` inside": (
        "test_flax_nnx test_jax_jit_with_functional_state"
    ),
    "scope functions": "test_flax_nnx test_scope_functions_get_the_paths_of_variables",
    "Linen with `TrainState`": (
        "test_flax_linen test_train_state test_gradients_and_statistics_come_from_one_pass"
    ),
    "`flax.serialization`": (
        "test_flax_linen test_a_train_state_is_written_and_read; test_saved_states "
        "test_flax_serialization test_flax_serialization_refuses_another_choice"
    ),
    # Equinox, Haiku
    "labels of `partition` for an Equinox module": (
        "test_equinox_haiku test_labels_of_a_module_are_given_by_a_function"
    ),
    "Equinox modules": (
        "test_equinox_haiku test_equinox test_fields_called_value_keep_their_name "
        "test_equinox_goes_the_way_of_its_list_of_arrays"
    ),
    "Haiku": "test_equinox_haiku test_haiku",
    "scopes by Haiku module or Equinox layer": (
        "test_equinox_haiku test_scopes_by_haiku_module_and_equinox_layer"
    ),
    # Checkpoints, ensembles, meta-learning
    "Orbax: save, restore, go on": "test_orbax test_save_restore_continue",
    "Orbax onto another mesh, or one device": "test_orbax test_restore_onto_another_sharding",
    "Orbax's `CheckpointManager` of an NNX model": (
        "test_orbax test_checkpoint_manager_of_an_nnx_model"
    ),
    "`jax.vmap` over seeds": (
        "test_meta_learning test_an_ensemble_in_one_program; test_transform "
        "test_vmap_trains_each_model_as_alone"
    ),
    "`jax.grad` through steps": (
        "test_meta_learning test_gradient_through_a_few_steps; test_transform "
        "test_zero_gradients_give_finite_updates_and_derivatives"
    ),
    "float16, bfloat16": "test_mixed_precision test_accuracy test_training_in_half_precision",
    "scaled losses": (
        "test_mixed_precision test_scaled_losses test_overflown_scaled_losses_are_skipped "
        "test_which_momentum_a_scale_left_in_place_does_not_change"
    ),
    "Flax's `DynamicScale` with several losses, FP8 layers": (
        "test_at_home test_flax_dynamic_scale_with_several_losses test_fp8_layers_in_a_train_state"
    ),
    'absent losses: `present=`, `not_finite="skip_loss"`': (
        "test_absent test_an_absent_loss_is_as_if_it_were_not_there "
        "test_every_weighting_weighs_the_losses_that_are_there "
        "test_skip_loss_leaves_out_what_is_not_finite_and_counts_it_by_name"
    ),
    "losses by name": (
        "test_absent test_numbers_beside_names_are_in_the_order_as_written "
        "test_preferences_by_name_and_in_the_order_as_written"
    ),
    "complex parameters": "test_at_home test_complex_parameters_as_their_two_parts",
    "weightings with a memory: `scan`, donation, `vmap`, sharding, Orbax": (
        "test_remembered test_scan_checkpoint_donation_vmap_sharding "
        "test_no_array_is_in_a_first_state_twice "
        "test_each_scope_remembers_for_itself"
    ),
    "other losses than before": (
        "test_carrying test_a_new_loss_is_one_that_was_absent_so_far "
        "test_a_loss_less_is_one_that_is_absent_from_now_on test_from_a_checkpoint; "
        "test_orbax test_save_restore_continue"
    ),
    "scopes": (
        "test_scopes test_every_scope_goes_as_if_it_were_alone test_one_label_is_one_geometry "
        "test_leaves_of_one_task_alone_are_trained_by_it"
    ),
    # Several alignment losses
    "dictionaries and tuples of losses, NNX modules": (
        "test_several test_gradients_are_those_of_each_loss "
        "test_work_of_one_loss_is_not_done_for_the_others test_modules_of_flax_nnx "
        "test_each_alignment_gradient_is_gated_by_itself"
    ),
    "one loss in a dictionary": (
        "test_several test_one_loss_in_a_dictionary_is_the_plain_form_bit_for_bit"
    ),
    "`over_pairs`, `MultiSteps`, `partition`, `masked`": (
        "test_several test_wrappers_masks_and_partitions"
    ),
    "half precision, `vmap`, explicit sharding, Orbax": (
        "test_several test_half_precision test_vmap_over_models "
        "test_shards_send_one_message_of_all_inner_products"
    ),
    "`gdmam_released`": "test_several test_the_released_form_takes_one_alignment_loss",
    # `fork` and `value_and_weighed_grad`
    "`fork` in modules of Flax NNX, Linen, Equinox": (
        "test_fork test_in_a_module_of_flax_nnx test_in_a_module_of_flax_linen "
        "test_in_a_module_of_equinox"
    ),
    "`fork` under `jit` with donated buffers, in `scan`, under `jax.checkpoint`": (
        "test_fork test_the_state_is_its_own_gradient_and_compiles_once "
        "test_a_fork_in_every_layer_of_a_scan_with_a_scheduled_preference"
    ),
    "`fork` on a mesh, in `shard_map`, `pmap`, `vmap` over examples": (
        "test_fork test_data_parallelism_costs_one_message_of_the_products "
        "test_inside_shard_map_the_axis_is_named test_inside_pmap_the_axis_is_named "
        "test_inside_a_vmap_over_examples_the_axis_is_named"
    ),
    "`fork` of half-precision features": (
        "test_fork test_sums_of_half_precision_are_taken_in_float32"
    ),
    "`fork` of trees with integers, masks, random keys": "test_fork test_forward_the_identity",
    "several forks, microbatches": (
        "test_fork test_several_forks_settle_apart "
        "test_the_state_goes_from_microbatch_to_microbatch"
    ),
    "`value_and_weighed_grad` with `jax.checkpoint`, `custom_vjp`, loops": (
        "test_gradients test_checkpointed_custom_and_looped_functions"
    ),
    "`value_and_weighed_grad` on a mesh with explicit axes": (
        "test_gradients test_arrays_sharded_over_explicit_axes_are_refused"
    ),
    "`gdmam_jax.nnx.value_and_weighed_grad`": (
        "test_gradients test_modules_of_flax_nnx_advance_once"
    ),
    "`fork` with a state under Flax's `DynamicScale`": (
        "test_fork test_dynamic_scale_divides_the_state_too"
    ),
    "a `jax.grad` inside a loss, through a `fork`": (
        "test_fork test_an_inner_derivative_is_weighed_too"
    ),
    "`jax.jvp` through a `fork`": "test_fork test_forward_mode_is_refused",
}
"""The rows of docs/compatibility.md, and for each the file and the tests that hold it."""

IN_NO_ROW = {
    "test_nnx test_errors_say_what_is_wrong",
    "test_nnx test_state_is_untouched_after_an_error",
    "test_nnx test_ordinary_optimizer_through_summed_is_nnx_grad_of_the_sum",
}


def test_every_deliberate_mistake_fits_the_code_and_is_counted_on_the_page():
    for mutant in MUTANTS:
        assert mutant.old in (ROOT / "gdmam_jax" / f"{mutant.module}.py").read_text(), mutant.what
    page = (ROOT / "docs/determinism.md").read_text()
    assert f"a test notices | {len(MUTANTS)} | {len(MUTANTS)} | `python -m tests.mutants`" in page


def test_every_row_of_compatibility_has_its_tests_and_every_test_its_row():
    assert rows("compatibility.md") == list(COMPATIBILITY)
    named = set()
    for tests in "; ".join(COMPATIBILITY.values()).split("; "):
        file, *names = tests.split()
        named |= {f"{file} {name}" for name in names}
    existing = {
        f"{path.stem} {name}"
        for path in [*(ROOT / "tests").glob("test_*.py"), *(ROOT / "tests").glob("*/test_*.py")]
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert named <= existing
    files = {path.stem for path in (ROOT / "tests" / "compatibility").glob("test_*.py")}
    demanded = {test for test in existing if test.split()[0] in {*files, "test_nnx"}}
    assert demanded - named == IN_NO_ROW


def message(node):
    """The text of an expression, with … for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return re.sub("…+", "…", "".join(map(message, node.values)))
        case ast.BinOp(op=ast.Add()):
            return message(node.left) + message(node.right)
    return "…"


def messages():
    """What the package raises; a text that is put into a variable first stands for itself."""
    for path in (ROOT / "gdmam_jax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        named = {
            node.targets[0].id: message(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = message(node.exc.args[0])
                if text.startswith("…") and isinstance(node.exc.args[0], ast.JoinedStr):
                    first = node.exc.args[0].values[0].value
                    text = named.get(getattr(first, "id", ""), "…") + text[1:]
                if re.sub("[…:; ]", "", text):
                    yield text


def test_every_error_is_on_its_page_and_every_message_of_the_page_is_raised():
    shown = [row.strip().strip("`") for row in rows("errors.md")]
    raised = list(messages())
    assert len(raised) > 100
    for text in raised:
        assert any(text.startswith(row) for row in shown), text
    for row in shown:
        assert any(text.startswith(row) for text in raised), row
    assert len(shown) == len({*shown})
