"""What `import hvdkit` refuses: real imports, each in a process whose packages are those of a made-up folder."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvdkit import versions

ROOT = Path(__file__).resolve().parents[2]
FITTING = {"tensorflow": "2.21.0", "keras": "3.15.1", "horovod": "0.28.1"}


class Environment:
    """A folder of packages that hold what `pip` writes down of each, and a home folder."""

    def __init__(self, path):
        self.packages = path / "packages"
        self.home = path / "home"
        self.packages.mkdir()
        self.home.mkdir()

    def install(self, name, version, module=None):
        """Writes down a distribution; with `module`, also that top-level module."""
        folder = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        folder.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if module:
            folder.joinpath("top_level.txt").write_text(f"{module}\n")
            self.packages.joinpath(f"{module}.py").write_text("raise SystemExit('it was imported')\n")

    def import_hvdkit(self, **environment):
        """Imports hvdkit with these packages alone, and returns the last line printed: 'ok' or the error."""
        return self.all_that_is_said(**environment)[-1]

    def all_that_is_said(self, **environment):
        """Likewise; returns all lines, errors and warnings last but for 'ok'."""
        program = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(self.packages)!r}]; import hvdkit; print('ok')"
        ended = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program],  # -S: nothing of the environment that runs this test
            env={"HOME": str(self.home), **environment},
            capture_output=True,
            text=True,
        )
        return (ended.stderr + ended.stdout).strip().splitlines()


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path)


def refused(environment, packages, **settings):
    for name, version in packages.items():
        environment.install(name, version)
    said = environment.import_hvdkit(**settings)
    assert said.startswith("ImportError: "), said
    return said.removeprefix("ImportError: ")


@pytest.mark.parametrize("python", [(3, 9), (3, 14), (2, 7)])
def test_a_python_out_of_range_is_refused(python):
    with pytest.raises(
        ImportError, match=rf"runs on Python 3\.10 to 3\.13, and .* is Python {python[0]}\.{python[1]}:"
    ):
        versions.check_python(python)


def test_the_range_of_python_is_that_of_the_package():
    needs = re.search('requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    (oldest, (major, newest)) = versions.OLDEST_PYTHON, versions.NEWEST_PYTHON
    assert needs == f">={'.'.join(map(str, oldest))},<{major}.{newest + 1}"


def test_the_ranges_of_the_package_are_those_of_the_table():
    needs = (ROOT / "pyproject.toml").read_text()
    (major, oldest), (_, newest) = min(versions.OLDEST_KERAS), max(versions.OLDEST_KERAS)
    assert f'"tensorflow>={major}.{oldest},<{major}.{newest + 1}"' in needs
    keras = ".".join(map(str, min(versions.OLDEST_KERAS.values())))
    assert f'"keras>={keras},<{versions.NEXT_KERAS[0]}"' in needs


def test_tensorflow_with_its_oldest_keras_is_accepted(tmp_path):
    for number, (tensorflow, keras) in enumerate(versions.OLDEST_KERAS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = Environment(folder)
        environment.install("tensorflow", f"{tensorflow[0]}.{tensorflow[1]}.0")
        environment.install("keras", ".".join(map(str, keras)))
        assert environment.import_hvdkit() == "ok", (tensorflow, keras)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("tensorflow", "2.15.1"),
        ("tensorflow", "2.22.0"),
        ("tensorflow-cpu", "2.15.0"),
        ("tensorflow_intel", "2.15.0"),
        ("tf-nightly", "2.22.0.dev20261101"),
    ],
)
def test_a_tensorflow_that_nothing_proves_is_refused(environment, name, version):
    said = refused(environment, {**FITTING, "tensorflow": version} if name == "tensorflow" else {name: version})
    assert "proven with TensorFlow 2.16 to 2.21, and /" in said
    assert re.search(
        rf"has {name.replace('_', '[-_]')} {re.escape(version)}: pip install 'tensorflow==2\.21\.\*'", said
    )


def test_a_version_that_is_to_become_one_of_the_range_is_accepted(environment):
    environment.install("tf-nightly", "2.21.0.dev20260101")
    environment.install("keras-nightly", "3.15.0.dev2026010103")
    assert environment.import_hvdkit() == "ok"


def test_a_vendors_build_is_known_by_its_version(environment):
    environment.install("tensorflow", "2.17.0+nv25.2")
    environment.install("keras", "3.10.0")
    assert environment.import_hvdkit() == "ok"


def test_a_distribution_of_any_name_is_found_by_what_it_brings_and_not_imported(environment):
    environment.install("tensorflow-of-somebody", "2.15.0", module="tensorflow")
    assert "has tensorflow-of-somebody 2.15.0: pip install" in environment.import_hvdkit()


def test_two_tensorflows_in_one_folder_are_refused(environment):
    said = refused(environment, {**FITTING, "tf-nightly": "2.20.0.dev20250101"})
    assert said.startswith("tensorflow 2.21.0 and tf-nightly 2.20.0.dev20250101 are installed side by side")


def test_two_names_of_one_tensorflow_are_accepted(environment):
    for name, version in {**FITTING, "tensorflow-cpu": "2.21.0"}.items():
        environment.install(name, version)
    assert environment.import_hvdkit() == "ok"


@pytest.mark.parametrize("version", ["2.15.0", "3.11.3", "4.0.0"])
def test_a_keras_that_nothing_proves_is_refused(environment, version):
    said = refused(environment, {**FITTING, "keras": version})
    assert "proven with Keras 3.12.0 or newer, below 4, on TensorFlow 2.21, and" in said
    assert said.endswith(f"has keras {version}: pip install 'keras>=3.12.0,<4'.")


@pytest.mark.parametrize("version", ["3.16.0", "3.16.0.dev2026080103", "3.20.1"])
def test_a_keras_newer_than_proven_is_warned_of_and_nothing_is_loaded(environment, version):
    environment.install("tensorflow", "2.21.0", module="tensorflow")  # which ends the process when it is imported
    environment.install("keras", version, module="keras")
    warning, last = environment.all_that_is_said()
    assert last == "ok"
    assert warning.startswith("<string>:1: UserWarning: hvdkit is proven with Keras up to 3.15, and /")  # the importer
    assert f" has keras {version}, with which" in warning
    assert warning.endswith("or pip install 'keras<3.16'.")


def test_the_newest_keras_that_is_proven_is_not_warned_of(environment):
    for name, version in {**FITTING, "keras": f"{'.'.join(map(str, versions.NEWEST_KERAS))}.9"}.items():
        environment.install(name, version)
    assert environment.all_that_is_said() == ["ok"]


def test_the_newest_keras_is_that_of_the_requirements():
    """tests/versions.py tries it, so this is what is proven."""
    pinned = re.search(r"^keras==(\d+)\.(\d+)\.", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert tuple(map(int, pinned.groups())) == versions.NEWEST_KERAS


def test_tensorflow_without_keras_is_refused(environment):
    assert "has none: pip install 'keras>=3.12.0,<4'" in refused(environment, {"tensorflow": "2.21.0"})


def test_another_horovod_is_refused(environment):
    said = refused(environment, {**FITTING, "horovod": "0.27.0"})
    assert re.search(r"Horovod 0\.28, and .* has 0\.27\.0: launch/bootstrap\.sh --into /", said)


def test_without_horovod_it_is_left_to_init(environment):
    environment.install("tensorflow", "2.21.0")
    environment.install("keras", "3.15.1")
    assert environment.import_hvdkit() == "ok"


def test_a_host_without_tensorflow_may_start_ranks(environment):
    environment.install("keras", "2.15.0")
    assert environment.import_hvdkit(KERAS_BACKEND="jax", TF_USE_LEGACY_KERAS="1") == "ok"


def test_another_backend_is_refused(environment):
    said = refused(environment, FITTING, KERAS_BACKEND="jax")
    assert said.startswith("hvdkit needs Keras' backend 'tensorflow', and the environment variable KERAS_BACKEND says")


@pytest.mark.parametrize("setting", ["HOME", "KERAS_HOME"])
def test_another_backend_in_keras_own_file_is_refused(environment, tmp_path, setting):
    folder = environment.home / ".keras" if setting == "HOME" else tmp_path / "elsewhere"
    folder.mkdir()
    file = folder / "keras.json"
    settings = {"KERAS_HOME": str(folder)} if setting == "KERAS_HOME" else {}
    file.write_text('{"floatx": "float32", "backend": "torch"}')
    assert f"and {file} says 'torch': set KERAS_BACKEND=tensorflow" in refused(environment, FITTING, **settings)
    assert environment.import_hvdkit(**settings, KERAS_BACKEND="tensorflow") == "ok"
    for content in ('{"backend": "tensorflow"}', '{"floatx": "float32"}', "{ not JSON"):
        file.write_text(content)
        assert environment.import_hvdkit(**settings) == "ok", content


@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_keras_2_in_the_place_of_keras_3_is_refused(environment, value):
    said = refused(environment, FITTING, TF_USE_LEGACY_KERAS=value)
    assert f"TF_USE_LEGACY_KERAS={value} makes tf.keras Keras 2: unset TF_USE_LEGACY_KERAS." in said
    assert environment.import_hvdkit(TF_USE_LEGACY_KERAS="0") == "ok"


def test_the_installed_packages_are_accepted_and_tensorflow_is_not_imported():
    program = "import hvdkit, sys; print([m for m in ('tensorflow', 'keras', 'horovod', 'numpy') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr
    assert importlib.metadata.version("tensorflow")
