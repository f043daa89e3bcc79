"""The arrows between packages, the file budget and the names that the wheel claims, enforced."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = {"gateway", "worker", "protocol", "kernels", "tests"}
ARROWS: dict[str, set[str]] = {
    "protocol": set(),
    "kernels": set(),
    "gateway": {"protocol"},
    "worker": {"kernels", "protocol"},
}
THIRD_PARTY: dict[str, set[str]] = {
    "protocol": {"msgspec"},
    "kernels": {"torch", "triton"},
    "gateway": {"httpx", "jinja2", "msgspec", "prometheus_client", "starlette", "tokenizers", "uvicorn", "zmq"},
    "worker": {
        "fsspec",
        "gguf",
        "huggingface_hub",
        "llguidance",
        "msgspec",
        "safetensors",
        "torch",
        "transformers",
        "zmq",
    },  # fmt: skip
}
# Scheduling is plain Python: these never import torch, so Hypothesis can drive them in microseconds a step.
TORCH_FREE = ["sequence", "fair_queue", "scheduler", "arena", "block_manager"]
TORCH_FREE += ["adapter", "adapter_cache", "chunk_layout", "config", "grammar"]
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_CODE_LINES = 18_000  # of the four packages; blank lines and comments are free


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_roots(path: Path) -> set[str]:
    """The top-level names that a module imports, imports inside functions and under TYPE_CHECKING included."""
    roots: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0] if node.level == 0 else path.relative_to(ROOT).parts[0])
    return roots - set(sys.stdlib_module_names)


ALL_MODULES = [path for package in ARROWS for path in modules(package)]


@pytest.mark.parametrize("package", ARROWS)
def test_package_imports_only_what_is_allowed(package: str) -> None:
    allowed = {package} | ARROWS[package] | THIRD_PARTY[package]
    for path in modules(package):
        assert imported_roots(path) <= allowed, f"{path.relative_to(ROOT)}: {imported_roots(path) - allowed}"


@pytest.mark.parametrize(
    "module", ["protocol.codec", "protocol.session", "gateway.app", "gateway.cli"] + [f"worker.{m}" for m in TORCH_FREE]
)
def test_importing_never_loads_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'triton', 'transformers', 'numpy'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("path", ALL_MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_says_what_it_is_and_fits_its_budget(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a file says in its first line what it is"
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_all_of_it_can_be_read_in_a_weekend() -> None:
    lines = [line.strip() for path in ALL_MODULES for line in path.read_text().splitlines()]
    assert sum(1 for line in lines if line and not line.startswith("#")) <= MAX_CODE_LINES


def test_nothing_can_unpickle() -> None:
    """Deserialising into code is how the peers were taken over; the words do not appear in the repository's Python."""
    banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    for path in [*ALL_MODULES, *modules("tests")]:
        assert not imported_roots(path) & banned, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    {alias.name.split(".")[0] for alias in node.names}
                    if isinstance(node, ast.Import)
                    else {node.module}
                )
                assert not names & banned, path
            if isinstance(node, ast.Attribute) and path.parts[-2] != "tests":
                assert node.attr not in {"recv_pyobj", "send_pyobj"}, path
                assert not (node.attr == "load" and getattr(node.value, "id", "") == "torch"), path


def test_top_level_holds_only_what_the_user_fixed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    top = {name.split("/")[0] for name in listed if name}
    fixed = {"pyproject.toml", "gateway", "worker", "protocol", "kernels", "tests", "deploy", "Makefile"}
    beside = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= fixed | beside


def test_our_packages_are_ours() -> None:
    """`kernels` is also the import name of Hugging Face's package, and transformers looks for it."""
    owners = importlib.metadata.packages_distributions()
    for package in ARROWS:
        assert set(owners.get(package, [])) <= {"polylora"}, f"{package} belongs to {owners[package]}"


def test_transformers_does_not_take_our_kernels_for_its_own() -> None:
    from transformers.utils import is_kernels_available

    assert is_kernels_available() is False
