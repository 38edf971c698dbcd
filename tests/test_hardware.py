"""GPUs against their datasheets, and what a user's own file may hold."""

import pickle

import pytest
import yaml

from kvsim.catalogue import DATA
from kvsim.errors import InputError
from kvsim.hardware import PEAK_DTYPES, list_gpus, load_gpu
from kvsim.units import GB, GIB, TB

# name: HBM GB/s, dense bf16 (T4: fp16) TFLOP/s, SMs, board power W, as the datasheets print them.
DATASHEET = {
    "a100-sxm-40gb": (1555, 312, 108, 400),
    "a100-sxm-80gb": (2039, 312, 108, 400),
    "a100-pcie-80gb": (1935, 312, 108, 300),
    "h100-sxm-80gb": (3350, 989.5, 132, 700),
    "h100-pcie-80gb": (2000, 756, 114, 350),
    "h100-nvl-94gb": (3938, 835, 132, 400),
    "h200-sxm-141gb": (4800, 989.5, 132, 700),
    "b200-sxm-180gb": (8000, 2250, 148, 1000),
    "l4-24gb": (300, 121, 58, 72),
    "l40s-48gb": (864, 362, 142, 350),
    "a10g-24gb": (600, 70, 80, 300),
    "a40-48gb": (696, 149.7, 84, 300),
    "rtx-a6000-48gb": (768, 154.8, 84, 300),
    "t4-16gb": (320, 65, 40, 70),
    "rtx-4090-24gb": (1008, 165.2, 128, 450),
    "rtx-pro-6000-96gb": (1792, 503.8, 188, 600),
    "rtx-pro-6000-server-96gb": (1597, 468, 188, 600),
    "mi300x-192gb": (5300, 1307, 304, 750),
    "mi325x-256gb": (6000, 1307, 304, 1000),
    "gh200-96gb": (4000, 989.5, 132, 700),
    "rtx-3090-24gb": (936, 71, 82, 350),
    "rtx-5090-32gb": (1792, 209.5, 170, 575),
}
CUT = ("b200", "nvl")
"""GPUs whose fp32 rate is not that of their SMs and boost clock, as far as datasheets tell: cut down, or of unstated clock."""

PLAIN = {
    "memory_gib": 24, "usable_memory_gib": 23.5, "hbm_bandwidth_gb_per_s": 1008, "l2_mib": 72, "num_sms": 128,
    "boost_clock_mhz": 2520, "host_link_gb_per_s": 31.5, "gpu_link_gb_per_s": None, "board_power_w": 450,
    "peak_tflops": {"fp16": 165.2},
}  # fmt: skip


def write(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_catalogue_is_complete():
    assert set(list_gpus()) == set(DATASHEET)


@pytest.mark.parametrize("name", DATASHEET)
def test_datasheet_numbers(name):
    gpu = load_gpu(name)
    bandwidth_gb_per_s, tflops, num_sms, power_w = DATASHEET[name]
    assert gpu.name == name
    assert gpu.hbm_bandwidth_bytes_per_s == bandwidth_gb_per_s * GB
    assert gpu.peak_flops("bf16") == pytest.approx(tflops * TB, rel=1e-3)
    assert (gpu.num_sms, gpu.board_power_w) == (num_sms, power_w)


@pytest.mark.parametrize("name", DATASHEET)
def test_numbers_are_consistent(name):
    gpu = load_gpu(name)
    assert 0.90 * gpu.hbm_bytes < gpu.usable_bytes <= gpu.hbm_bytes
    assert gpu.gpu_link_bytes_per_s >= min(gpu.host_link_bytes_per_s, 63e9)  # NVLink-C2C leads to a CPU
    assert gpu.has_gpu_link or gpu.gpu_link_bytes_per_s == min(gpu.host_link_bytes_per_s, 63e9)
    for slower, faster in (("fp32", "fp16"), ("bf16", "fp8"), ("bf16", "int8")):
        assert gpu.peak_flops(slower) <= gpu.peak_flops(faster)
    # 8-bit units run at twice the 16-bit rate, or at four times where fp32 accumulation halves the latter (GeForce).
    if "fp8" in gpu.peak_flops_per_s:
        assert gpu.peak_flops("fp8") == pytest.approx(2 * gpu.peak_flops("bf16"), rel=0.02)
    # fp32: 128 lanes a SM (64 on A100 and Turing), two FLOPs a cycle.
    if gpu.vendor == "nvidia" and not any(part in name for part in CUT):
        lanes = 64 if gpu.compute_capability in ((8, 0), (7, 5)) else 128
        assert gpu.peak_flops("fp32") == pytest.approx(gpu.num_sms * lanes * 2 * gpu.boost_clock_hz, rel=0.02)


@pytest.mark.parametrize("name", DATASHEET)
def test_every_number_has_a_source(name):
    content = yaml.safe_load((DATA / "gpus" / f"{name}.yaml").read_text())
    sections = ("peak_tflops", "sustained_tflops")
    numbers = {key: entry for key, entry in content.items() if key not in ("name", "vendor", "aliases", *sections)}
    numbers |= {f"{section}.{dtype}": entry for section in sections for dtype, entry in content.get(section, {}).items()}
    assert set(content["peak_tflops"]) == set(PEAK_DTYPES)
    for key, entry in numbers.items():
        assert len(entry["source"]) > 3, key
        assert load_gpu(name).sources[key] == entry["source"]


def test_usable_memory_is_what_torch_reports():
    assert load_gpu("l4").usable_bytes / GIB == pytest.approx(22.17)
    assert load_gpu("a100").usable_bytes / GIB == pytest.approx(79.25)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("a100", "a100-sxm-80gb"), ("h100", "h100-sxm-80gb"), ("h100-sxm", "h100-sxm-80gb"), ("h200", "h200-sxm-141gb"),
     ("b200", "b200-sxm-180gb"), ("L4", "l4-24gb"), ("rtx-4090", "rtx-4090-24gb"), ("RTX_4090", "rtx-4090-24gb"),
     ("t4", "t4-16gb"), ("mi300x", "mi300x-192gb"), ("l40s", "l40s-48gb")],
)  # fmt: skip
def test_aliases(alias, name):
    assert load_gpu(alias).name == name


def test_peak_falls_back_where_the_gpu_has_no_units():
    assert load_gpu("a100").peak_flops("fp8") == 312 * TB
    assert load_gpu("t4").peak_flops("bf16") == load_gpu("t4").peak_flops("fp8") == 65 * TB
    assert load_gpu("h100").peak_flops("int4") == load_gpu("h100").peak_flops("int8")
    with pytest.raises(InputError, match="dtype='fp4' must be one of"):
        load_gpu("h100").peak_flops("fp4")


def test_sustained_rates_are_measured_ones():
    assert load_gpu("mi300x").sustained_flops_per_s == {"fp16": 654 * TB, "bf16": 708 * TB, "fp8": 1273 * TB}
    assert load_gpu("mi300x").sources["sustained_tflops.bf16"].startswith("rocm.blogs.amd.com")
    assert not load_gpu("h100").sustained_flops_per_s


def test_gpu_can_be_hashed_and_sent_to_another_process():
    gpu = load_gpu("h100")
    assert pickle.loads(pickle.dumps(gpu)) == gpu
    assert hash(gpu) == hash(load_gpu("h100-sxm-80gb"))


def test_user_file_with_plain_numbers(tmp_path):
    gpu = load_gpu(write(tmp_path, PLAIN))
    assert gpu.name == "mine"
    assert gpu.sources["num_sms"] == "user file"
    assert not gpu.has_gpu_link and gpu.gpu_link_bytes_per_s == 31.5 * GB
    assert gpu.compute_capability is None
    assert load_gpu(str(write(tmp_path, PLAIN | {"num_sms": {"value": 5, "source": "me"}}))).sources["num_sms"] == "me"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sms": 0}, r"gpu.num_sms=0 must be >= 1"),
        ({"num_sms": 1.5}, r"gpu.num_sms=1.5 must be a whole number"),
        ({"l2_mib": -1}, r"gpu.l2_mib=-1 must be a finite number > 0"),
        ({"l2_mib": float("nan")}, r"gpu.l2_mib=nan must be a finite number > 0"),
        ({"l2_mib": True}, r"gpu.l2_mib=true must be a number"),
        ({"hbm_bandwidth_gb_per_s": "fast"}, r"gpu.hbm_bandwidth_gb_per_s='fast' must be a number"),
        ({"board_power_w": None}, r"gpu.board_power_w must not be null"),
        ({"board_powr_w": 3}, r"gpu.board_powr_w is not a known key; did you mean board_power_w\?"),
        ({"usable_memory_gib": 25}, r"gpu.usable_memory_gib=25.0 must not exceed memory_gib=24"),
        ({"peak_tflops": 3}, r"gpu.peak_tflops=3 must hold a mapping"),
        ({"peak_tflops": {"fp32": 3}}, r"gpu.peak_tflops.fp16 is missing"),
        ({"sustained_tflops": 3}, r"gpu.sustained_tflops=3 must hold a mapping"),
        ({"sustained_tflops": {"fp16": 330}}, r"gpu.sustained_tflops.fp16=330.0 must be 0.1 to 1.5 times peak_tflops.fp16=165.2"),
        ({"sustained_tflops": {"fp16": 0.165}}, r"gpu.sustained_tflops.fp16=0.165 must be 0.1 to 1.5 times peak_tflops.fp16=165.2"),
        ({"sustained_tflops": {"fp16": "165"}}, r"gpu.sustained_tflops.fp16='165' must be a number; write it without quotes"),
        ({"sustained_tflops": {"fp8": 100}}, r"gpu.sustained_tflops.fp8=100.0 must be left out: peak_tflops.fp8 is null"),
        ({"sustained_tflops": {"int4": 3}}, r"gpu.sustained_tflops.int4=3 must be left out; weights of 4 bits"),
        ({"sustained_tflops": {"fp61": 3}}, r"gpu.sustained_tflops.fp61 is not a known key; did you mean fp16\?"),
        ({"peak_tflops": {"fp16": 3, "fp17": 3}}, r"gpu.peak_tflops.fp17 is not a known key"),
        ({"compute_capability": 8.9}, r"gpu.compute_capability=8.9 must be text"),
        ({"vendor": "intel"}, r"gpu.vendor='intel' must be one of nvidia, amd"),
        ({"num_sms": {"value": 5, "sauce": "x"}}, r"gpu.num_sms.sauce is not a known key"),
        ("num_sms: [1,\n", r"is not valid YAML at line 2"),
        ("- 1\n", r"must hold a mapping"),
        ("", r"must hold a mapping"),
    ],
)
def test_bad_user_file_is_one_clear_line(tmp_path, change, message):
    path = write(tmp_path, change if isinstance(change, str) else PLAIN | change)
    with pytest.raises(InputError, match=message) as error:
        load_gpu(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10", r"gpu='h10' is not in the catalogue; did you mean h100.*`kvsim list gpus`"),
        ("", r"is not in the catalogue"),
        ("nope.yaml", r"gpu='nope.yaml' does not exist"),
        ("/", r"is a folder"),
    ],
)
def test_unknown_name_or_missing_file(name, message):
    with pytest.raises(InputError, match=message):
        load_gpu(name)
