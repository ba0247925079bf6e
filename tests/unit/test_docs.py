"""What people read: the README, the package's docs, the maps of folders, the measured figures and the files for deployment."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import make_options, plot_results
from obcache_sglang.scheduler import metrics
from obcache_sglang.settings import OPTIONS

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "obcache_sglang" / "docs"
DEPLOY = ROOT / "launch" / "deploy"
RESULTS = ROOT / "launch" / "results"
# Not the whole checkout: its environment has hundreds of thousands of files.
FOLDERS = ("launch", "obcache_sglang", "patches", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
TEXTS = [
    *PAGES,
    *sorted(path for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".yaml") or "Dockerfile" in path.name),
]
LONGEST_README = 150  # lines


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r'(?:src|href)="([^"]+)"', text)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for link in links(page):
        if re.match(r"(https?|mailto):", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_blocks_parse(page: Path) -> None:
    for language, code in re.findall(
        r"^ *```(\w+)\n(.*?)^ *```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    ):
        if language == "python":
            ast.parse(code)
        elif language == "json":
            json.loads(code)
        elif language in ("bash", "sh"):
            checked = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True, check=False)
            assert checked.returncode == 0, f"{checked.stderr}\n{code}"


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_flags_exist(text: Path) -> None:
    known = {option.flag for option in OPTIONS.values()}
    for flag in re.findall(r"--obcache-[a-z0-9-]+[a-z0-9]", text.read_text(encoding="utf-8")):
        # Not flags of the server: the bench has one of its own.
        assert flag in known or flag == "--obcache-flags", flag


@cache
def metric_names() -> set[str]:
    """Of all that is counted for Prometheus, without its prefix."""
    source = Path(metrics.__file__).read_text(encoding="utf-8")
    return set(re.findall(r'(?:counter|gauge|histogram)\(\s*"(\w+)"', source)) | set(
        re.findall(r'"sglang:obcache_(\w+)"', source)
    ) - {"{name"}


@pytest.mark.parametrize("text", [*TEXTS, DEPLOY / "dashboard.json"], ids=name_of)
def test_metrics_exist(text: Path) -> None:
    for name in re.findall(r"sglang:obcache_(\w+)", text.read_text(encoding="utf-8")):
        assert name in metric_names() or name.removesuffix("_bucket") in metric_names(), name


def test_every_metric_of_ours_is_in_the_guide_and_on_the_dashboard() -> None:
    assert {"contexts", "resident_slots_saved", "compression_seconds", "exact_total"} <= metric_names()
    for page in (DOCS / "guide.md", DEPLOY / "dashboard.json"):
        text = page.read_text(encoding="utf-8")
        assert [name for name in sorted(metric_names()) if f"sglang:obcache_{name}" not in text] == [], page


def test_the_page_of_options_is_the_generated_one() -> None:
    assert (DOCS / "options.md").read_text(encoding="utf-8") == make_options.make_page(), "run python -m launch.make_options"


@pytest.mark.parametrize("folder", ["tests", "launch"])
def test_every_file_is_on_its_map(folder: str) -> None:
    page = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    mapped = set(re.findall(r"`([\w./-]+)`", page))
    # launch/deploy has a map of its own; the pages of results are linked, not listed.
    mapped |= set(re.findall(r"\]\(([^)]+)\)", page))
    missing = []
    for path in sorted((ROOT / folder).rglob("*")):
        name = str(path.relative_to(ROOT / folder))
        if path.is_dir() or "__pycache__" in name or path.name == "__init__.py" or name.startswith("deploy/"):
            continue
        if name not in mapped and path.name not in mapped:
            missing.append(name)
    assert missing == []
    for named in mapped:
        if re.fullmatch(r"[\w/]+\.(py|sh|csv|svg|json|txt)", named) and not (ROOT / named).exists():
            assert list((ROOT / folder).rglob(named)), named


def test_every_file_for_deployment_is_on_its_map() -> None:
    page = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in DEPLOY.iterdir() if f"`{path.name}`" not in page and path.name != "README.md"] == []


@pytest.mark.parametrize("page", ["design.md", "contributing.md", "methods.md"])
def test_modules_that_docs_name_exist(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:obcache_sglang|launch|tests|scoring|scheduler)/[\w/]+\.\w+)`", text):
        assert (ROOT / name).exists() or (ROOT / "obcache_sglang" / name).exists(), name


def test_tests_that_the_guide_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", (DOCS / "guide.md").read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_changes_name_the_release_of_sglang() -> None:
    titles = re.findall(r"^## (.*)$", (DOCS / "changes.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert titles
    assert [title for title in titles if not re.search(r"SGLang \d+\.\d+\.\d+", title)] == []


def test_plots_are_drawn_from_their_data(tmp_path: Path) -> None:
    for file in ("accuracy.csv", "bench.csv", "scaling.csv"):
        shutil.copy(RESULTS / file, tmp_path)
    for drawn in plot_results.draw(tmp_path):
        committed = RESULTS / drawn.name
        assert committed.stat().st_size < 200_000
        # Other releases of matplotlib place things a little elsewhere; the words are the data's.
        texts = [re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text(encoding="utf-8")) for file in (drawn, committed)]
        assert texts[0] == texts[1], "run python -m launch.plot_results"


def test_examples_are_short_and_parse() -> None:
    for example in (ROOT / "launch" / "examples").iterdir():
        text = example.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 30, example
        if example.suffix == ".py":
            ast.parse(text)
        else:
            assert subprocess.run(["bash", "-n", example], check=False).returncode == 0, example


# --- deployment -----------------------------------------------------------------------------------------------------------


def test_yaml_is_clean() -> None:
    linter = pytest.importorskip("yamllint.linter")
    config = pytest.importorskip("yamllint.config").YamlLintConfig(file=str(DEPLOY / ".yamllint.yaml"))
    for file in DEPLOY.glob("*.yaml"):
        assert [str(problem) for problem in linter.run(file.read_text(encoding="utf-8"), config)] == [], file


def test_compose_is_two_replicas_after_a_router() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert set(services) == {"replica-1", "replica-2", "router"}
    assert set(services["router"]["depends_on"]) == {"replica-1", "replica-2"}
    workers = [word for word in services["router"]["command"] if word.startswith("http://")]
    assert workers == ["http://replica-1:30000", "http://replica-2:30000"]
    for service in services.values():
        build = service["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).exists()


def test_kubernetes_allows_for_calibration_and_keeps_profiles() -> None:
    manifests = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    by_kind = {(each["kind"], each["metadata"]["name"]): each["spec"] for each in manifests}
    replicas = by_kind["StatefulSet", "obcache-sglang"]
    (container,) = replicas["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800
    (claim,) = replicas["volumeClaimTemplates"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    cache_home = re.search(r"XDG_CACHE_HOME=(\S+)", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))
    assert cache_home is not None
    assert mounts[claim["metadata"]["name"]] == cache_home[1]
    for kind, name in (("StatefulSet", "obcache-sglang"), ("Deployment", "obcache-router")):
        labels = by_kind[kind, name]["template"]["metadata"]["labels"]
        assert by_kind[kind, name]["selector"]["matchLabels"] == by_kind["Service", name]["selector"] == labels
    router = by_kind["Deployment", "obcache-router"]["template"]["spec"]["containers"][0]
    workers = [word for word in router["args"] if word.startswith("http://")]
    assert workers == [f"http://obcache-sglang-{n}.obcache-sglang:30000" for n in range(replicas["replicas"])]


def test_the_router_knows_which_replica_has_a_document() -> None:
    assert '"--policy", "cache_aware"' in (DEPLOY / "router.Dockerfile").read_text(encoding="utf-8")


def test_the_router_of_the_docs_is_the_deployed_one() -> None:
    command = json.loads(
        (DEPLOY / "router.Dockerfile").read_text(encoding="utf-8").partition("ENTRYPOINT ")[2].replace("\\\n", "")
    )
    (shown,) = re.findall(r"launch_router (.*?)--worker-urls", (DOCS / "routers.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert shown.replace("\\\n", "").split() == command[command.index("--policy") :]


def test_the_image_has_the_pinned_sglang() -> None:
    (pin,) = re.findall(r'"sglang==([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"lmsysorg/sglang:v{pin}\n" in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


DASHBOARD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["title", "uid", "schemaVersion", "panels", "templating", "time"],
    "properties": {
        "panels": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["id", "type", "title", "gridPos"],
                "properties": {
                    "type": {"enum": ["row", "timeseries"]},
                    "gridPos": {"type": "object", "required": ["h", "w", "x", "y"]},
                    "targets": {
                        "type": "array",
                        "minItems": 1,
                        "items": {"type": "object", "required": ["refId", "expr", "legendFormat"]},
                    },
                },
            },
        },
    },
}


def test_the_dashboard_is_one_and_asks_for_metrics_of_sglang() -> None:
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text(encoding="utf-8"))
    pytest.importorskip("jsonschema").validate(dashboard, DASHBOARD_SCHEMA)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    collectors = Path(spec.origin).parent / "srt" / "observability"
    source = "".join(file.read_text(encoding="utf-8") for file in collectors.glob("*.py"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            assert target["expr"].count("(") == target["expr"].count(")")
            for name in re.findall(r"sglang:(?!obcache)(\w+)", target["expr"]):
                assert f'sglang:{name.removesuffix("_bucket")}"' in source, name


# --- the package ----------------------------------------------------------------------------------------------------------


def test_the_licence_is_apache() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert project["license-files"] == ["LICENSE"]


def test_a_wheel_has_the_docs_and_installs_into_an_empty_environment(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "obcache_sglang", source / "obcache_sglang", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        ".",
    ]
    built = subprocess.run(build, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for page in DOCS.glob("*.md"):
        assert f"obcache_sglang/docs/{page.name}" in names
    assert "obcache_sglang/profiles/smollm2-135m.json" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)

    # Without SGLang, which takes 11 GB.
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, cwd=tmp_path)
    program = (
        "import obcache_sglang; from importlib.metadata import distribution; "
        "print(obcache_sglang.__version__, *sorted(point.group for point in distribution('obcache-sglang').entry_points))"
    )
    said = subprocess.run([python, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert said[1:] == ["sglang.srt.platforms", "sglang.srt.plugins"]
    assert f"obcache_sglang-{said[0]}-" in wheel.name
