"""The image, built for real on a base that debootstrap makes, and what runs in it: training, MPI, sshd, health check.

One test builds it once: what it costs is the building. It is skipped where the same image has passed before: see
image_proof.py. Commands in the image have a network of their own, with nothing but loopback in it, so that its port
2222 is nobody else's.
"""

import ast
import json
import os
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import tomllib

from tests.conftest import ROOT, run_command
from tests.integration.image_proof import Proof, sources

PYTHON = "/opt/hvdkit/bin/python"
LAUNCH = ["python", "-m", "hvdkit.launch", "-np", "2"]
HEALTH_CHECK = ["python", "-I", "/opt/hvdkit/healthcheck.py"]
MOST_MIB = 2400


class Images:
    """`buildah` with a storage of its own, under a folder that goes when the test ends."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {"TMPDIR": str(folder / "tmp")}
        (folder / "tmp").mkdir(parents=True)
        self.driver = "overlay"
        if self("info", fails=True).code != 0:
            self.driver = "vfs"  # which copies, and works everywhere

    def __call__(self, *arguments, timeout=120, fails=False):
        """Runs buildah; unless it may fail, its failure is the test's."""
        storage = ["--root", self.folder / "root", "--runroot", self.folder / "run", "--storage-driver", self.driver]
        ended = run_command(["buildah", *storage, *arguments], timeout=timeout, env=self.environment)
        if not fails and ended.code != 0:
            pytest.fail(f"buildah {arguments[0]} ended with {ended.code}:\n{ended.output}")
        return ended

    def remove(self):
        """Removes everything, mounts first."""
        self("rm", "--all", fails=True)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if (mount := line.split()[4]).startswith(str(self.folder)):
                run_command(["umount", "-l", mount], timeout=60)
        shutil.rmtree(self.folder)


class Container:
    """A container of the image, to run commands in."""

    def __init__(self, images, image):
        self.images = images
        self.name = images("from", image).output.split()[-1]
        self.folder = Path(images("mount", self.name).output.split()[-1])
        self.hosts = images.folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost container\n")  # what docker writes, and buildah does not

    def run(self, *command, user="10001:10001", timeout=300, volumes=(), fails=False):
        """Runs a command as the image's user, without a network."""
        storage = ["--root", self.images.folder / "root", "--runroot", self.images.folder / "run"]
        volumes = [part for volume in volumes for part in ("--volume", volume)]
        named = ["--hostname", "container", "--volume", f"{self.hosts}:/etc/hosts:ro"]
        run = ["run", "--isolation", "chroot", "--user", user, *named, *volumes, self.name, "--", *command]
        line = shlex.join(str(part) for part in ["buildah", *storage, "--storage-driver", self.images.driver, *run])
        alone = ["unshare", "--net", "sh", "-c", f"ip link set lo up && exec {line}"]
        ended = run_command(alone, timeout=timeout, env=self.images.environment)
        if not fails and ended.code != 0:
            pytest.fail(f"in the image, {command} ended with {ended.code}:\n{ended.output}")
        return ended


@pytest.fixture
def proof():
    """The stamp that a passed test keeps; skips the test where it is kept already, and where no image can be built."""
    missing = [name for name in ("buildah", "debootstrap", "apt-cache", "ip", "unshare") if not shutil.which(name)]
    reason = f"the commands {', '.join(missing)} are missing" if missing else "root is needed" if os.geteuid() else ""
    if reason:
        # Where the variable is set, as CI does, the image must be built: a skip would pass for a success.
        refuse = pytest.fail if os.environ.get("HVDKIT_TEST_HOSTS") else pytest.skip
        refuse(f"no image can be built: {reason}; install them with: apt-get install buildah debootstrap iproute2")
    found = Proof(ROOT)
    found.skip_if_proven()
    return found


@pytest.fixture
def images(tmp_path):
    """A place for images, which goes when the test ends."""
    place = Images(tmp_path / "images")
    yield place
    place.remove()


def _make_base(images):
    """A minimal system of this machine's own release, from its own mirror and with its own settings of apt."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    asked = ["apt-get", "indextargets", "--format", "$(SITE)", f"Codename: {release}", "Created-By: Packages"]
    mirror = run_command(asked, timeout=60).output.split()[0]
    name = images("from", "scratch").output.split()[-1]
    folder = Path(images("mount", name).output.split()[-1])
    make = ["debootstrap", "--variant=minbase", "--include=ca-certificates", release, folder, mirror]
    made = run_command(make, timeout=600)
    assert made.code == 0, made.output
    settings = run_command(["apt-config", "dump", "--no-empty", "Acquire"], timeout=60).output
    (folder / "etc/apt/apt.conf.d/99machine").write_text(settings)
    images("commit", "--rm", name, "base", timeout=300)


def _pip_of_this_machine(folder):
    """The volumes that tell a build's pip what this machine's is told, by files and variables, and what those name."""
    folder.mkdir()
    told = run_command([sys.executable, "-m", "pip", "config", "list"], timeout=60).output
    settings = {}
    for key, value in re.findall(r"^(?::env:|global|install)\.([\w-]+)=('.*'|\".*\")$", told, re.MULTILINE):
        settings.setdefault(key, ast.literal_eval(value))  # variables come first, and count more
    volumes = {}
    for key, value in settings.items():
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.is_file():
                shutil.copy(path, folder / f"{key}-{path.name}")
                settings[key] = settings[key].replace(word, f"/etc/xdg/pip/{key}-{path.name}")
            elif path.is_absolute() and path.is_dir():
                shown = path.parent if word.startswith("file://") else path  # an index links to the files beside it
                volumes[shown] = f"{shown}:{shown}:ro"
    lines = [f"{key} = {value}" for key, value in settings.items()]
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines]))
    return [f"{folder}:/etc/xdg/pip:ro", *volumes.values()]


def _build(images, folder):
    """The Dockerfile, given the Horovod wheels that were built here: they fit if compiler and C library do."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    cache = Path(os.environ.get("HVDKIT_CACHE", home / "hvdkit"))
    cache.mkdir(parents=True, exist_ok=True)
    for name in ("buildah-cache", "buildah-cache-0"):  # where buildah has what is mounted as id=hvdkit; older, newer
        place = images.folder / "tmp" / name
        place.mkdir()
        (place / "hvdkit").symlink_to(cache)
    volumes = [part for volume in _pip_of_this_machine(folder / "pip") for part in ("--volume", volume)]
    build = ["bud", "--isolation", "chroot", "--format", "docker", "--layers=false", "--build-arg", "BASE_IMAGE=base"]
    return images(*build, *volumes, "--tag", "hvdkit", ROOT, timeout=1500).output


def _check_labels(images):
    """What the image says of itself; returns the command that it runs."""
    said = json.loads(images("inspect", "--type", "image", "hvdkit").output)["Docker"]["config"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in said["Labels"].items()}
    assert labels["title"] == project["name"]
    assert labels["version"] == project["version"], "change VERSION in the Dockerfile with pyproject.toml"
    assert labels["licenses"] == project["license"]
    assert said["User"] == "10001:10001", "a number: Kubernetes' runAsNonRoot takes no name"
    assert said["Healthcheck"]["Test"] == ["CMD", *HEALTH_CHECK]
    return [*said["Entrypoint"], *said["Cmd"]]


def _check_contents(container):
    """No key that others have too, nothing that only a compiler reads, and a bounded size."""
    assert container.run("id", "-u").output.split()[-1] == "10001"
    assert not list(container.folder.glob("etc/ssh/ssh_host_*"))
    assert not list(container.folder.glob("opt/hvdkit/lib/python3*/site-packages/tensorflow/include"))
    assert container.run("sh", "-c", "command -v g++ nvcc", fails=True).code != 0
    assert container.run("touch", "/opt/hvdkit/mine", fails=True).code != 0
    used = int(run_command(["du", "-sm", container.folder], timeout=60).output.split()[0])
    assert used < MOST_MIB


def _check_training(container, command):
    """The command that `docker run` runs, as its user and without a network."""
    ended = container.run(*command)
    assert "2 replica(s): test accuracy" in ended.output
    (result,) = container.folder.glob("home/hvdkit/runs/*/result.json")
    assert json.loads(result.read_text())["test_accuracy"] > 0.95
    assert (result.parent / "model.keras").stat().st_uid == 10001


def _check_health(container):
    """The check passes, and would not if a library that was compiled could not be loaded."""
    container.run(*HEALTH_CHECK)
    (library,) = container.folder.glob("opt/hvdkit/lib/python3*/site-packages/horovod/tensorflow/mpi_lib.*.so")
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    try:
        assert container.run(*HEALTH_CHECK, fails=True).code == 1
    finally:
        library.write_bytes(whole)


def _check_mpi(container):
    """Ranks that mpirun starts find each other, with the launcher and without."""
    line = "f'rank {hvd.rank()} of {hvd.size()} {hvd.mpi_enabled()}\\n'"
    program = f"import hvdkit as hvd; hvd.init(); print({line}, end='')"  # in one write: other ranks' fall between two
    ended = container.run(*LAUNCH, "--mpi", "--output", "all", "--", "python", "-c", program)
    assert {"rank 0 of 2 True", "rank 1 of 2 True"} <= set(re.findall(r"rank \d of \d \w+", ended.output))
    ended = container.run("mpirun", "-np", "2", "--oversubscribe", "python", "-c", program)
    assert {"rank 0 of 2 True", "rank 1 of 2 True"} <= set(re.findall(r"rank \d of \d \w+", ended.output))


SSHD = """
serve() { /usr/sbin/sshd -De -f /home/hvdkit/.sshd_config "$@" & }
reaches() { echo "$1: $(shift; "$@" 2>&1 | tr '\\r\\n' '  ')"; }
serve
serve -p 2223 -h /strangers/key
for port in 2222 2223; do until (: </dev/tcp/127.0.0.1/$port) 2>/dev/null; do sleep 0.1; done; done
reaches key ssh localhost 'id -u; command -v python mpirun'
reaches password ssh -o PreferredAuthentications=password,keyboard-interactive localhost id -u
reaches stranger ssh -i /strangers/key -o IdentitiesOnly=yes localhost id -u
reaches impostor ssh -o BatchMode=yes -p 2223 localhost id -u
kill %1 %2
"""


def _check_sshd(container, folder):
    """Whoever has the job's key is let in, and nobody else; and only a host that has it is believed."""
    refused = container.run("timeout", "10", "/usr/sbin/sshd", "-De", "-f", "/home/hvdkit/.sshd_config", fails=True)
    assert refused.code == 1
    assert "no hostkeys available" in refused.output
    for name, file in (("job", "id_rsa"), ("strangers", "key")):
        (folder / name).mkdir()
        run_command(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", folder / name / file], timeout=60)
    shutil.copy(folder / "job" / "id_rsa.pub", folder / "job" / "authorized_keys")
    os.chown(folder / "strangers" / "key", 10001, 10001)
    for file in (folder / "job").iterdir():  # as Kubernetes mounts a Secret for a user who is not root
        os.chown(file, 0, 10001)
        file.chmod(0o440)
    volumes = [f"{folder}/job:/home/hvdkit/.ssh:ro", f"{folder}/strangers:/strangers:ro"]
    ended = container.run("timeout", "60", "bash", "-c", SSHD, volumes=volumes)
    said = dict(re.findall(r"^(key|password|stranger|impostor): (.*)$", ended.output, re.MULTILINE))
    assert said["key"].split() == ["10001", PYTHON, "/usr/bin/mpirun"], ended.output
    assert "Permission denied (publickey)" in said["password"], ended.output
    assert "Permission denied (publickey)" in said["stranger"], ended.output
    assert "Host key verification failed" in said["impostor"], ended.output


@pytest.mark.slow
@pytest.mark.image
@pytest.mark.timeout(2400)
def test_the_image_is_built_and_does_what_it_is_for(proof, images, tmp_path):
    _make_base(images)
    assert "Horovod with gloo+mpi sums right" in _build(images, tmp_path)
    command = _check_labels(images)
    container = Container(images, "hvdkit")
    _check_contents(container)
    _check_health(container)
    _check_sshd(container, tmp_path)
    _check_mpi(container)
    _check_training(container, command)
    proof.keep()


def _append(file, text):
    with file.open("a") as opened:
        opened.write(f"\n{text}\n")


@pytest.mark.slow
def test_what_counts_for_the_image(tmp_path):
    parts = ["Dockerfile", ".dockerignore", "requirements.txt", "pyproject.toml", "launch", "hvdkit", "models"]
    for part in [*parts, "tests/integration/test_image.py"]:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, tmp_path / part)
    before = sources(tmp_path)
    assert before == sources(ROOT)
    for file, text in {
        "hvdkit/reporting.py": "# more",
        "pyproject.toml": "[tool.other]\n",
        "README.md": "more",
    }.items():
        _append(tmp_path / file, text)
    assert sources(tmp_path) == before
    changes = {
        "Dockerfile": "# more",
        "requirements.txt": "# more",
        "launch/image/slim.sh": "# more",
        "launch/bootstrap.sh": "# more",
        "hvdkit/launch/__main__.py": "# more",
        "hvdkit/reporting.py": "import another_package",
        "models/another.py": "",
        "hvdkit/table.csv": "",
        "pyproject.toml": '[tool.setuptools.other]\nx = "y"\n',
    }
    for file, text in changes.items():
        _append(tmp_path / file, text)
        after = sources(tmp_path)
        assert after != before, file
        before = after


@pytest.mark.slow
def test_an_image_is_proven_only_by_a_stamp(tmp_path, monkeypatch):
    monkeypatch.setenv("HVDKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("HVDKIT_TEST_IMAGE", raising=False)
    made = Proof(ROOT)
    made.skip_if_proven()
    made.keep()
    assert [p.parent.name for p in tmp_path.rglob("image-*")] == ["proven"]
    with pytest.raises(pytest.skip.Exception, match="proven before, 20.*: stamp .*/proven/image-"):
        Proof(ROOT).skip_if_proven()
    monkeypatch.setenv("HVDKIT_TEST_IMAGE", "always")
    Proof(ROOT).skip_if_proven()
    monkeypatch.setenv("HVDKIT_TEST_IMAGE", "yes")
    with pytest.raises(pytest.fail.Exception, match="HVDKIT_TEST_IMAGE is 'yes'; expected is 'always'"):
        Proof(ROOT).skip_if_proven()
