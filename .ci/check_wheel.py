"""What the wheel must hold, and that its command runs where nothing of this repository can be seen."""

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
wheel = Path(sys.argv[1]).resolve()

with zipfile.ZipFile(wheel) as archive:
    found = {name for name in archive.namelist() if ".dist-info/" not in name}
    licences = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
kinds = (".py", ".html", ".typed")
expected = {str(path.relative_to(root)) for path in (root / "jepa_hf").rglob("*") if path.suffix in kinds}
assert found == expected, f"missing: {sorted(expected - found)}; not ours: {sorted(found - expected)}"
assert licences, "the licence is missing"

with tempfile.TemporaryDirectory() as folder:
    venv.create(folder, with_pip=False)
    python = f"{folder}/bin/python"
    # The dependencies are those of the environment that runs this; the package itself comes from the wheel.
    (site,) = Path(folder).glob("lib/python*/site-packages")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-q", wheel], check=True)
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(others) + "\n")
    where = "import jepa_hf, pathlib; print(pathlib.Path(jepa_hf.__file__).parent)"
    for command in ([f"{folder}/bin/jepa-hf", "--help"], [python, "-I", "-c", where]):
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert Path(said.strip()) == site / "jepa_hf", said
print(f"{wheel.name}: {len(found)} files, its command runs")
