"""The doctor: one verdict a fault, with a remedy, and a report that survives a broken environment."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from metatrain.observe import doctor
from metatrain.observe.doctor import Check, Report, Status
from metatrain.observe.machine import cpu_count, memory_bytes

GIB = 2**30
NONE = {"torchrec": None, "fbgemm-gpu": None, "fbgemm-gpu-cpu": None}


def fbgemm_check(driver: bool = False, **versions: str) -> Check:
    found = NONE | {name.replace("_", "-"): version for name, version in versions.items()}
    return next(check for check in doctor.table_checks(found, driver) if check.name == "FBGEMM")


def test_cpu_flavour_is_well_without_a_driver():
    check = fbgemm_check(torchrec="1.8.0", fbgemm_gpu_cpu="1.8.0")
    assert (check.status, check.value) == (Status.OK, "1.8.0, cpu flavour")


def test_gpu_flavour_is_well_with_a_driver():
    assert fbgemm_check(driver=True, torchrec="1.8.0", fbgemm_gpu="1.8.2").status is Status.OK


def test_both_flavours_fail_with_a_remedy():
    check = fbgemm_check(torchrec="1.8.0", fbgemm_gpu="1.8.0", fbgemm_gpu_cpu="1.8.0")
    assert check.status is Status.FAIL
    assert "keep one" in str(check.remedy)


def test_gpu_flavour_fails_without_a_driver():
    check = fbgemm_check(torchrec="1.8.0", fbgemm_gpu="1.8.0")
    assert check.status is Status.FAIL
    assert "fbgemm-gpu-cpu" in str(check.remedy)


def test_cpu_flavour_beside_a_driver_is_noted():
    assert fbgemm_check(driver=True, torchrec="1.8.0", fbgemm_gpu_cpu="1.8.0").status is Status.WARN


def test_unequal_minors_fail():
    check = fbgemm_check(torchrec="1.8.0", fbgemm_gpu_cpu="1.9.0")
    assert check.status is Status.FAIL
    assert "minors" in str(check.remedy)


def test_missing_tables_fail():
    assert [check.status for check in doctor.table_checks(NONE, False)] == [Status.FAIL, Status.FAIL]


def test_another_python_fails():
    assert doctor.python_check((3, 12), "3.12.1").status is Status.FAIL


def test_unmet_requirements_are_named(monkeypatch: pytest.MonkeyPatch):
    wanted = ["pytest>=9999", "no-such-distribution==1", "numpy>=1", 'pytest>=9999; extra == "never"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda n: "0.1.0" if n == "metatrain" else version(n))
    summary, *wrong = doctor.requirement_checks()
    assert summary.value == "0.1.0; 1 of 3 requirements met"
    assert [(check.name, check.status) for check in wrong] == [
        ("pytest", Status.FAIL),
        ("no-such-distribution", Status.FAIL),
    ]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "100000"}, 0.25),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_cpus_are_the_control_groups(tmp_path: Path, files: dict[str, str], expected: float | None):
    unlimited = cpu_count(tmp_path / "absent")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_count(tmp_path) == (unlimited if expected is None else expected)


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_memory_is_the_control_groups(tmp_path: Path, name: str):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f"{10 * 2**20}\n")
    assert memory_bytes(tmp_path) == 10 * 2**20
    (tmp_path / name).write_text("max\n")
    assert memory_bytes(tmp_path) == memory_bytes(tmp_path / "absent") > 10 * 2**20


def usage(monkeypatch: pytest.MonkeyPatch, total: float, free: float) -> None:
    ntuple = type(doctor.shutil.disk_usage("/"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: ntuple(int(total), int(total - free), int(free)))


@pytest.mark.parametrize(
    ("total", "free", "status"),
    [
        (100 * GIB, 50 * GIB, Status.OK),
        (100 * GIB, 4 * GIB, Status.WARN),
        (2 * GIB, 0.5 * GIB, Status.FAIL),
    ],
)
def test_disk(monkeypatch: pytest.MonkeyPatch, total: float, free: float, status: Status):
    usage(monkeypatch, total, free)
    assert doctor.disk_check("disk", ".").status is status


def test_absent_folder_fails_without_raising():
    assert doctor.disk_check("disk", "/no/such/folder").status is Status.FAIL


def test_little_shared_memory_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    usage(monkeypatch, 64 * 2**20, 64 * 2**20)  # a container's default
    check = doctor.shared_memory_check(tmp_path)
    assert check.status is Status.WARN
    assert "--shm-size" in str(check.remedy)
    assert doctor.shared_memory_check(tmp_path / "absent").status is Status.WARN


def test_descriptors():
    assert doctor.descriptor_check(1024, resource.RLIM_INFINITY).status is Status.OK
    assert doctor.descriptor_check(1024, 1024).status is Status.WARN


def test_small_machine_is_noted():
    assert doctor.cpu_check(0.5).status is Status.WARN
    assert doctor.cpu_check(2).status is Status.OK
    assert doctor.memory_check(2 * GIB).status is Status.WARN


def test_broken_import_becomes_a_failed_check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_TRY_TABLES", "raise ImportError('libcuda.so.1: cannot open shared object file')")
    report = doctor.examine(try_ray=False)
    assert not report.healthy
    [failed] = [check for check in report.checks if check.name == "FBGEMM and TorchRec"]
    assert failed.status is Status.FAIL
    assert "libcuda.so.1" in failed.value


def test_a_machine_without_a_compiler_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    report = doctor.examine(try_ray=False)
    assert report.healthy
    [noted] = [check for check in report.checks if check.name == "kernels"]
    assert noted.status is Status.WARN
    assert "no C++ compiler" in noted.value


def test_hanging_trial_is_ended():
    process = doctor._start("import time; time.sleep(60)")
    check = doctor._ended(process, "Ray starts here", "well", "remedy", seconds=0.2)
    assert check.status is Status.FAIL
    assert "no answer" in check.value
    assert process.returncode is not None


def test_table_and_verdict():
    report = Report(
        (Check("a", "1"), Check("longer", "2", Status.WARN, "see to it"), Check("c", "3", Status.FAIL, "mend it"))
    )
    assert report.render().splitlines() == [
        "ok    a       1",
        "warn  longer  2",
        "              → see to it",
        "FAIL  c       3",
        "              → mend it",
        "",
        "1 ok, 1 to note, 1 to mend",
    ]
    assert not report.healthy
    assert Report(report.checks[:2]).healthy


def test_this_environment_has_no_failure():
    report = doctor.examine(try_ray=False)
    assert [check for check in report.checks if check.status is Status.FAIL] == []
