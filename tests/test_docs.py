"""README, docs/ and examples/ name only what exists: files, links, commands, options, errors, environment variables."""

from __future__ import annotations

import builtins
import dataclasses
import html
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from vllm_maxtext_loader import errors
from vllm_maxtext_loader.cli.app import app
from vllm_maxtext_loader.options import VARIABLES, Options

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm_maxtext_loader"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MANIFEST = ROOT / "examples" / "kubernetes.yaml"
FOLLOWING = ROOT / "examples" / "kubernetes_follow.yaml"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_of(page: Path) -> list[str]:
    """Code of a page: spans in backticks, and lines of blocks with continuation lines joined."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (.+)$", prose, flags=re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [*lines, *indented, *re.findall(r"`([^`\n]+)`", prose)]


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pages
def test_named_files_exist(page: Path) -> None:
    named = {
        name
        for code in code_of(page) + re.findall(r"\S+", page.read_text())
        for name in re.findall(r"(?<![\w/.<])[\w-]+(?:/[\w-]+)*\.(?:py|sh|md|yaml|svg)\b", code)
    }
    named = {name for name in named if not name.startswith("FILE.")}
    missing = [
        name for name in named if not any((base / name).exists() for base in (ROOT, page.parent, PACKAGE))
    ]
    assert missing == []


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"{page.name})" not in readme] == []


@pages
def test_commands_and_options_exist(page: Path) -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for code in code_of(page):
        if not code.startswith("vllm-maxtext "):
            continue
        name, *rest = shlex.split(code, comments=True)[1:]
        assert name in commands, code
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert [word for word in rest if word.startswith("--") and word not in known] == [], code


def test_readme_lists_the_keys_of_the_extra_config() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert rows == [field.name for field in dataclasses.fields(Options)]


@pages
def test_named_errors_exist(page: Path) -> None:
    for name in re.findall(r"`(\w+Error)`", page.read_text()):
        assert hasattr(errors, name) or hasattr(builtins, name), name


def source_of(package: str, file: str) -> str:
    """Text of a module of another package, found without importing it; skips where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0], file).read_text()


def variables() -> list[tuple[str, str]]:
    """(variable, owner) of the table in docs/tpu-vm.md."""
    rows = re.findall(
        r"^\| (`[A-Z].*?`) \| ([^|]+) \|", (ROOT / "docs/tpu-vm.md").read_text(), flags=re.MULTILINE
    )
    return [(name, owner.strip()) for names, owner in rows for name in re.findall(r"`(\w+)`", names)]


def test_our_variables_are_documented_and_exist() -> None:
    source = "\n".join(file.read_text() for file in PACKAGE.rglob("*.py"))
    documented = {name for name, owner in variables() if owner == "this package"}
    assert documented == set(re.findall(r'"(VLLM_MAXTEXT_\w+)"', source)) == set(VARIABLES)
    for page in PAGES:
        assert set(re.findall(r"VLLM_MAXTEXT_[A-Z_]+", page.read_text())) <= documented


@pytest.mark.parametrize(
    ("owner", "package", "files"),
    [
        ("vLLM", "vllm", ["envs.py"]),
        ("tpu-inference", "tpu_inference", ["envs.py"]),
        ("huggingface_hub", "huggingface_hub", ["constants.py", "utils/_auth.py"]),
    ],
)
def test_variables_of_the_neighbours_exist(owner: str, package: str, files: list[str]) -> None:
    source = "".join(source_of(package, file) for file in files)
    names = [name for name, whose in variables() if whose == owner]
    assert names
    assert [name for name in names if f'"{name}"' not in source] == []


def test_variables_of_tensorstore_exist() -> None:
    spec = importlib.util.find_spec("tensorstore")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (library,) = Path(spec.submodule_search_locations[0]).glob("_tensorstore*.so")
    content = library.read_bytes()
    names = [name for name, owner in variables() if owner == "TensorStore"]
    assert names
    assert [name for name in names if name.encode() not in content] == []


def manifest(file: Path = MANIFEST) -> dict[str, dict[str, Any]]:
    """The example's objects by kind."""
    return {entry["kind"]: entry for entry in yaml.safe_load_all(file.read_text())}


def containers(file: Path) -> dict[str, dict[str, Any]]:
    """The containers of the example's pod, by name."""
    pod = manifest(file)["Deployment"]["spec"]["template"]["spec"]
    return {container["name"]: container for container in pod["containers"]}


def command_in_manifest(file: Path = MANIFEST, container: str = "vllm") -> str:
    """The command that a container of it ends in."""
    script = containers(file)[container]["args"][0].replace("\\\n", " ")
    (command,) = re.findall(r"^exec (.+)$", script, flags=re.MULTILINE)
    return command


def test_manifest_agrees_with_itself() -> None:
    objects = manifest()
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    (container,) = pod["containers"]
    command = shlex.split(command_in_manifest())
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    assert command[command.index("--tensor-parallel-size") + 1] == str(chips)
    assert command[command.index("--port") + 1] == str(container["ports"][0]["containerPort"])
    assert pod["serviceAccountName"] == objects["ServiceAccount"]["metadata"]["name"]
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    (claim,) = [
        volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert claim["claimName"] == objects["PersistentVolumeClaim"]["metadata"]["name"]
    ports = {port["name"] for port in container["ports"]}
    assert {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe")} <= ports
    startup = container["startupProbe"]
    timeout = {entry["name"]: entry.get("value") for entry in container["env"]}["VLLM_ENGINE_READY_TIMEOUT_S"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= int(timeout)


def test_manifest_that_follows_is_the_other_one_with_two_containers() -> None:
    plain, objects = manifest(), manifest(FOLLOWING)
    config = objects.pop("ConfigMap")
    pods = [each["Deployment"]["spec"]["template"]["spec"] for each in (plain, objects)]
    inside = containers(FOLLOWING)
    assert list(inside) == ["vllm", "proxy", "follow"]
    vllm, proxy = inside["vllm"], inside["proxy"]
    (was,) = pods[0]["containers"]
    # vLLM's port, and the probes that need it, are the proxy's.
    for key in ("ports", "startupProbe", "readinessProbe"):
        served = proxy.pop(key)
        assert served == was.pop(key) or (key, served[0]["name"]) == ("ports", "http")
    assert {"name": "VLLM_SERVER_DEV_MODE", "value": "1"} in vllm["env"]
    vllm["env"].remove({"name": "VLLM_SERVER_DEV_MODE", "value": "1"})
    commands = [shlex.split(command_in_manifest(file)) for file in (MANIFEST, FOLLOWING)]
    assert commands[1] == [*commands[0][:-2], "--host", "127.0.0.1", *commands[0][-2:]]
    assert was.pop("args")[0].replace("--port", "--host 127.0.0.1 --port") == vllm.pop("args")[0]
    assert vllm == was
    # Only what is for everybody is passed on, to vLLM's address, which is the one that is followed.
    address = f"http://127.0.0.1:{commands[1][-1]}"
    nginx = config["data"]["default.conf"]
    rules = re.findall(r"location (.+) \{ (.+); \}", nginx)
    assert rules == [
        ("/v1/", f"proxy_pass {address}"),
        ("= /health", f"proxy_pass {address}"),
        ("/", "return 404"),
    ]
    assert re.findall(r"listen (\d+);", nginx) == ["8080"]
    command = shlex.split(command_in_manifest(FOLLOWING, "follow"))
    assert command == ["vllm-maxtext", "follow", commands[1][2], "--url", address]
    assert "follow" in typer.main.get_command(app).commands  # type: ignore[attr-defined]
    (volume,) = [volume for volume in pods[1]["volumes"] if volume["name"] == "proxy"]
    assert proxy["volumeMounts"] == [{"name": "proxy", "mountPath": "/etc/nginx/conf.d"}]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    pods[1]["volumes"].remove(volume)
    for pod in pods:
        pod.pop("containers")
    assert pods[1].pop("terminationGracePeriodSeconds") >= 60
    assert objects == plain


def kuberay_job() -> dict[str, Any]:
    """The RayJob of the example for several hosts."""
    documents = yaml.safe_load_all((ROOT / "examples" / "kuberay.yaml").read_text())
    (job,) = [document for document in documents if document["kind"] == "RayJob"]
    return job["spec"]


def test_kuberay_manifest_agrees_with_itself() -> None:
    job = kuberay_job()
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    command = shlex.split(job["entrypoint"])
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    assert command[command.index("--tensor-parallel-size") + 1] == str(chips * group["numOfHosts"])
    # A JSON string in quotes, as the shell that runs `ray start` needs it.
    assert json.loads(job["entrypointResources"]) == json.loads(
        json.loads(group["rayStartParams"]["resources"])
    )
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["TPU_MULTIHOST_BACKEND"] == "ray"


@pytest.mark.engine
def test_vllm_accepts_every_serve_command() -> None:
    """One process parses all of them: vLLM's parser takes seconds to import."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    commands = [command_in_manifest(file) for file in (MANIFEST, FOLLOWING)]
    commands.append(kuberay_job()["entrypoint"])
    for page in PAGES:
        commands += [
            re.sub(r"^[A-Z_]+=\S+ ", "", code)
            for code in code_of(page)
            if re.match(r"(?:[A-Z_]+=\S+ )*vllm serve [^…]+$", code)
        ]
    arguments = [shlex.split(command, comments=True)[2:] for command in commands]
    assert len(arguments) > 5
    done = subprocess.run(
        [sys.executable, "-m", "support.vllm_arguments"],
        input=json.dumps(arguments),
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT))),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(len(arguments))


def shown_text(svg: str) -> list[str]:
    """Words in an SVG, in order."""
    return " ".join(html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", svg)).split()


def test_picture_of_inspect_is_current() -> None:
    """After a change of its output: `python docs/pictures.py`."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    stored = (ROOT / "docs/images/inspect.svg").read_text()
    assert shown_text(stored) == shown_text(pictures.inspect_svg())
    assert "url(http" not in stored
