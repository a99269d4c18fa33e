"""Prints the parity tables as Markdown: `python -m tests.parity`."""

from tests.parity.problems import GOLDEN
from tests.parity.trajectories import FORMS, PROBLEMS, compare, compare_golden


def main() -> None:
    print(
        "| form | model | dtype | deviation from PyTorch | own float32 from own float64 | "
        "PyTorch's float32 from its float64 | steps in conflict | steps clipped |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for form in FORMS:
        for problem in PROBLEMS:
            found = compare(problem, form)
            shares = f"{found['conflicts']:.0%} | {found['clipped']:.0%}"
            print(f"| {form} | {problem} | float64 | {found['float64']:.1e} | | | {shares} |")
            print(
                f"| {form} | {problem} | float32 | | {found['jax_float32']:.1e} | "
                f"{found['torch_float32']:.1e} | {shares} |"
            )
    print("\n| recorded run | quantity | replayed | end to end |\n| --- | --- | --- | --- |")
    for name in GOLDEN:
        replayed = compare_golden(name, end_to_end=False)
        for quantity, figure in compare_golden(name, end_to_end=True).items():
            other = f"{replayed[quantity]:.1e}" if quantity in replayed else ""
            print(f"| {name} | {quantity} | {other} | {figure:.1e} |")


if __name__ == "__main__":
    main()
