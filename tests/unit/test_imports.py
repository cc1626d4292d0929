"""The shape of the package: imports go one way, other libraries stay where they belong, files stay readable."""

from __future__ import annotations

import ast
import functools
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lorapre_dist"

# An import goes to a lower layer, or stays within its own.
LAYERS = [
    {"config"},
    {"core"},
    {"layouts"},
    {"state"},
    {"optimizers"},
    {"checkpoint"},
    {"integrations"},
    {"training", "launcher", "bench", "cli", "planner", "shipped"},
]
# Beside the layers: the oracle, which nothing but its users' front page and measurements may lean on.
ORACLE = "reference"
# Modules that name the library deepspeed: the door, what asks it which keys it reads, the layouts that read its
# optimizers, and in the training program what builds a model under zero.Init, what starts the ranks, asks MPI for them
# and reads the JSON (there only inside functions).
DEEPSPEED_LAZILY = {f"lorapre_dist.{name}" for name in ("training.run.program", "training.run.discovery")}
DEEPSPEED_LAZILY.add("lorapre_dist.config.ds_training")
MODELS = {f"lorapre_dist.training.{name}" for name in ("engines.models", "engines.pipeline", "finetune.models")}
DEEPSPEED = {f"lorapre_dist.integrations.deepspeed.{name}" for name in ("bind", "keys")} | MODELS | DEEPSPEED_LAZILY
DEEPSPEED_LAYOUTS = "lorapre_dist.layouts.zero"
# The library's own heavy or optional companions.
TRAINING_ONLY = {"accelerate", "transformers", "datasets", "tokenizers", "tensorboard", "wandb", "matplotlib", "tqdm"}
TRAINING_ONLY |= {"peft"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def only_for_types(tree: ast.Module) -> set[ast.AST]:
    """Everything under ``if TYPE_CHECKING:``."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


@functools.cache
def imports(name: str) -> list[tuple[str, bool]]:
    """What a module imports, in full: our modules and others' (with dots), and whether inside a function."""
    tree = ast.parse(MODULES[name].read_text())
    skipped = only_for_types(tree)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    lazy = {inner for function in functions for inner in ast.walk(function)}
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # ``from package import module`` imports the module, ``from module import name`` the module before it.
            targets = [f"{source}.{alias.name}" for alias in node.names]
            found += [(t if t in MODULES else source, node in lazy) for t in targets]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            target = node.args[0]
            if isinstance(target, ast.Constant) and target.value.startswith("."):
                found.append((package + target.value, node in lazy))
    return found


def ours(name: str) -> set[str]:
    return {target for target, _ in imports(name) if target in MODULES and target != name}


def part(name: str) -> str:
    """The layer's entry that a module belongs to: ``core`` for ``lorapre_dist.core.rules.adam``."""
    return name.split(".")[1] if "." in name else ""


def layer(name: str) -> int:
    found = [k for k, parts in enumerate(LAYERS) if part(name) in parts]
    assert found, f"{name} is in no layer: say in LAYERS where it belongs"
    return found[0]


LAYERED = [name for name in MODULES if part(name) not in ("", ORACLE, "__main__")]


def test_the_parser_sees_what_is_there():
    """The other tests would pass on an empty list."""
    assert ours("lorapre_dist.core.regression") >= {"lorapre_dist.core.exchange", "lorapre_dist.core.interval"}
    assert ours("lorapre_dist.layouts.zero3") >= {"lorapre_dist.layouts.base", "lorapre_dist.core.interval"}
    assert ours("lorapre_dist.optimizers.binding") >= {
        "lorapre_dist.config",
        "lorapre_dist.config.param_groups",
        "lorapre_dist.state.state_dict",
    }
    assert ("deepspeed", False) in imports("lorapre_dist.integrations.deepspeed.bind")
    assert ("datasets", True) in imports("lorapre_dist.training.data.documents")


@pytest.mark.parametrize("name", LAYERED)
def test_imports_go_one_way(name):
    for target in ours(name):
        if target == "lorapre_dist":  # the front page, which imports everything below
            assert layer(name) == len(LAYERS) - 1, f"{name} imports the package's front page"
        elif part(target) != ORACLE:
            assert layer(target) <= layer(name), f"{name} imports {target}, which is above it"


def test_there_is_no_cycle():
    graph = {name: ours(name) - {"lorapre_dist"} for name in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", [n for n in MODULES if part(n) == "core"])
def test_core_knows_tensors_and_groups_only(name):
    assert {part(target) for target in ours(name)} <= {"core"}
    of_triton = {f"lorapre_dist.core.kernels.{name}" for name in ("tile", "rows", "vector")}
    others = {"triton"} if name in of_triton else set()  # which is imported where it is there
    found = {target.split(".")[0] for target, _ in imports(name)}
    assert found - {"lorapre_dist", "torch"} - others <= sys.stdlib_module_names


def test_reference_imports_the_settings_alone():
    assert {part(name) for name in ours("lorapre_dist.reference")} == {"config"}
    users = {name for name in MODULES if "lorapre_dist.reference" in ours(name)}
    assert {part(name) for name in users} <= {"", "bench"}, users


def test_the_root_holds_what_users_import_and_run():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "reference", "cli"}


@pytest.mark.parametrize("name", MODULES)
def test_deepspeed_the_library_stays_behind_its_door(name):
    uses = [lazy for target, lazy in imports(name) if target.split(".")[0] == "deepspeed"]
    if uses:
        assert name in DEEPSPEED or name.startswith(DEEPSPEED_LAYOUTS), f"{name} imports deepspeed"
    if name in DEEPSPEED_LAZILY:
        assert all(uses), f"{name} may import deepspeed inside functions only"


@pytest.mark.parametrize("name", [n for n in MODULES if part(n) != "training" and ".huggingface" not in n])
def test_models_data_and_plots_stay_in_the_training_program(name):
    top = {target.split(".")[0] for target, lazy in imports(name) if not (lazy and part(name) in ("bench", "planner"))}
    assert not top & TRAINING_ONLY


# What ``lorapre`` does with a checkpoint works in one process, on a machine where no rank could start.
OFFLINE = [f"lorapre_dist.checkpoint.{name}" for name in ("stored", "safetensors_files", "consolidate", "inspect")]


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_work_joins_no_group(name):
    used = {target for target, _ in imports(name) if target.startswith("torch.distributed")}
    assert {target for target in used if not target.startswith("torch.distributed.checkpoint.")} == set()
    assert "lorapre_dist.checkpoint.team" not in ours(name)


def test_the_command_line_imports_what_a_command_needs_when_it_runs():
    light = {f"lorapre_dist{name}" for name in ("", ".checkpoint", ".integrations.deepspeed.quiet")}
    for target, lazy in imports("lorapre_dist.cli"):
        ours_and_light = target in light or part(target) == "config"
        assert lazy or ours_and_light or target.split(".")[0] in sys.stdlib_module_names, target


@pytest.mark.parametrize("name", MODULES)
def test_files_are_found_through_the_package(name):
    """What is installed has no repository around it: data files come from :mod:`lorapre_dist.config.shipped`."""
    names = {node.id for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Name)}
    assert "__file__" not in names


COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object", "all_reduce", "all_to_all"),
    *("all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "reduce"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "scatter", "send", "recv", "isend", "irecv"),
)


# ``full`` and ``dtensors`` collect the whole state on request, outside of steps.
ISSUES_COLLECTIVES = ("lorapre_dist.core.comm", "lorapre_dist.state.full", "lorapre_dist.state.dtensors")


@pytest.mark.parametrize("name", [n for n in LAYERED if layer(n) <= 4 and n not in ISSUES_COLLECTIVES])
def test_collectives_of_a_step_are_issued_in_comm_alone(name):
    tree = ast.parse(MODULES[name].read_text())
    found = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in COLLECTIVES
        and ast.unparse(node.value).split(".")[-1] in ("dist", "distributed")
    ]
    assert not found


def test_tests_do_not_import_the_benches():
    """But those of the benches themselves, and what counts a step's operations with their instruments."""
    allowed = {"test_step.py", "overlap_cases.py"}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name.startswith("test_bench") or path.name in allowed:
            continue
        found = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        assert not [node for node in found if "lorapre_dist.bench" in ast.unparse(node)], path


# size ---------------------------------------------------------------------------------------------------------------
