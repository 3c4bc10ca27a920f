"""`split_model`: the documents' map, the balanced map and its figures, uneven cards, spilling, errors (SPEC 10)."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.utils import check_device_map

import nvlm
from nvlm import device_map as device_map_module
from nvlm.device_map import LAYERS, memory_per_device, module_sizes, parse_memory, split_model

GOLDEN = Path(__file__).parent / "golden"
ENDS = [
    "vision_model",
    "mlp1",
    "language_model.model.embed_tokens",
    "language_model.model.rotary_emb",
    "language_model.model.norm",
    "language_model.lm_head",
]


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on every machine."""
    monkeypatch.setattr(device_map_module, "_count_gpus", lambda: 0)


def with_gpus(monkeypatch: pytest.MonkeyPatch, *free: str | None, host: str = "0GB") -> None:
    """Pretend that this machine has GPUs with so much free memory each."""
    monkeypatch.setattr(device_map_module, "_count_gpus", lambda: len(free))
    sizes = [None if size is None else parse_memory(size) for size in free]
    monkeypatch.setattr(device_map_module, "_free_gpu_memory", sizes.__getitem__)
    monkeypatch.setattr(device_map_module, "_free_host_memory", lambda: parse_memory(host))


def layer_devices(device_map: dict[str, Any]) -> list[Any]:
    num_layers = sum(part.startswith(LAYERS) for part in device_map)
    return [device_map[f"{LAYERS}.{i}"] for i in range(num_layers)]


def gigabytes(device_map: dict[str, Any], **kwargs: Any) -> dict[Any, float]:
    return {device: size / 1e9 for device, size in memory_per_device(device_map, **kwargs).items()}


def test_sizes_are_those_of_the_specification() -> None:
    sizes = module_sizes()
    assert sizes["vision_model"] / 1e9 == pytest.approx(12.11, abs=0.005)
    assert sizes["mlp1"] / 1e9 == pytest.approx(1.24, abs=0.005)
    assert sizes[f"{LAYERS}.0"] / 1e9 == pytest.approx(1.755, abs=0.0005)
    assert sizes["language_model.model.embed_tokens"] / 1e9 == pytest.approx(2.49, abs=0.005)
    assert sizes["language_model.lm_head"] / 1e9 == pytest.approx(2.49, abs=0.005)
    assert sum(sizes.values()) / 1e9 == pytest.approx(158.76, abs=0.005)


def test_sizes_are_those_of_a_loaded_model(load_model: Callable[..., nvlm.NVLM_D_Model]) -> None:
    model = load_model("base", drop_dummy_heads=False)
    for config in (model.config, model.config.to_dict()):
        for part, size in module_sizes(config, torch.float32).items():
            assert size == sum(p.numel() * 4 for p in model.get_submodule(part).parameters()), part


def test_sizes_without_dummy_heads_are_smaller(recipe: ModuleType) -> None:
    config = nvlm.NVLM_D_Config()
    before = module_sizes(config)["vision_model"]
    config.vision_config.num_dummy_heads = 0
    assert before - module_sizes(config)["vision_model"] == 2 * 516_176_640


def test_the_constant_is_the_published_config() -> None:
    assert module_sizes(device_map_module._NVLM_D_72B) == module_sizes(None)


@pytest.mark.parametrize("num_gpus", range(1, 17))
def test_documents_policy_is_the_documents_map(num_gpus: int) -> None:
    golden = json.loads((GOLDEN / "split_model.json").read_text())["layers"]
    device_map = split_model(world_size=num_gpus, policy="documents")
    assert layer_devices(device_map) == golden[str(num_gpus)]
    assert [device_map[part] for part in ENDS] == [0] * len(ENDS)
    assert len(device_map) == 80 + len(ENDS)


@pytest.mark.parametrize(("num_gpus", "expected"), [(2, 79.7), (4, 40.4), (8, 21.1)])
def test_balanced_policy_needs_what_the_specification_says(num_gpus: int, expected: float) -> None:
    assert max(gigabytes(split_model(world_size=num_gpus)).values()) == pytest.approx(expected, abs=0.05)


def test_eight_cards_of_24_gb_are_enough() -> None:
    device_map = split_model(max_memory=dict.fromkeys(range(8), "24GB"))
    assert set(device_map.values()) == set(range(8))


@pytest.mark.parametrize("policy", ["balanced", "documents"])
@pytest.mark.parametrize("num_gpus", [0, 1, 2, 3, 5, 8, 13, 16, 100])
def test_every_module_and_no_other_has_a_device(num_gpus: int, policy: str) -> None:
    device_map = split_model(world_size=num_gpus, policy=policy)
    assert set(device_map) == {*ENDS, *(f"{LAYERS}.{i}" for i in range(80))}
    assert set(device_map.values()) <= set(range(num_gpus) if num_gpus else ["cpu"])


@pytest.mark.parametrize("num_gpus", range(1, 17))
def test_balanced_layers_are_in_order_between_the_ends(num_gpus: int) -> None:
    device_map = split_model(world_size=num_gpus)
    devices = layer_devices(device_map)
    assert devices == sorted(devices)
    assert {device_map[part] for part in ENDS[:4]} == {0}
    assert {device_map[part] for part in ENDS[4:]} == {num_gpus - 1}


@pytest.mark.parametrize("seed", range(20))
def test_no_map_of_uneven_cards_is_better(seed: int) -> None:
    rng = random.Random(seed)
    cards = {gpu: rng.randint(30, 90) * 10**9 for gpu in range(rng.randint(6, 9))}
    sizes = module_sizes()
    layer = sizes[f"{LAYERS}.0"]
    fixed = dict.fromkeys(cards, 0)
    fixed[0] += sum(sizes[part] for part in ENDS[:4])
    fixed[len(cards) - 1] += sum(sizes[part] for part in ENDS[4:])

    def holds_all(fullness: float) -> bool:
        free = [math.floor((fullness * cards[gpu] - fixed[gpu]) / layer + 1e-9) for gpu in cards]
        return min(free) >= 0 and sum(free) >= 80

    best = min(
        fullness
        for gpu in cards
        for fullness in ((fixed[gpu] + n * layer) / cards[gpu] for n in range(81))
        if holds_all(fullness)
    )
    used = memory_per_device(split_model(max_memory=cards))
    assert max(used[gpu] / cards[gpu] for gpu in used) == pytest.approx(best)


def test_larger_cards_take_more() -> None:
    used = gigabytes(split_model(max_memory={0: "48GB", 1: "80GB", 2: "80GiB"}))
    assert used[0] < used[1] <= used[2]
    assert used[0] <= 0.9 * 48
    assert used[2] <= 0.9 * 80 * 1.074


def test_the_ends_move_on_where_a_card_is_too_small_for_them() -> None:
    device_map = split_model(max_memory=dict.fromkeys(range(12), "16GB"))
    assert device_map["vision_model"] == 0
    assert device_map["language_model.model.embed_tokens"] == 1
    assert max(gigabytes(device_map).values()) <= 0.9 * 16


def test_indices_may_have_gaps() -> None:
    device_map = split_model(max_memory={3: "100GB", 7: "100GB"})
    assert (device_map["vision_model"], device_map["language_model.lm_head"]) == (3, 7)
    assert set(split_model(max_memory={3: "1GB", 7: "1GB"}, policy="documents").values()) == {3, 7}


def test_what_the_cards_cannot_hold_goes_to_the_host_then_to_disk() -> None:
    device_map = split_model(max_memory={0: "24GB", 1: "24GB", "cpu": "60GB", "disk": "1TB"})
    devices = layer_devices(device_map)
    order = [0, 1, "cpu", "disk"]
    assert [order.index(device) for device in devices] == sorted(order.index(device) for device in devices)
    assert set(devices) == set(order)
    used = gigabytes(device_map)
    # Offloaded layers come to the first GPU when they run: it keeps room for one.
    assert used[0] <= 0.9 * 24 - 1.755
    assert used["cpu"] <= 60
    assert device_map["language_model.lm_head"] == 1


def test_a_card_too_small_for_the_encoder_still_serves() -> None:
    device_map = split_model(max_memory={0: "10GB", "cpu": "1TB"})
    assert device_map["vision_model"] == "cpu"
    assert 0 in device_map.values()


def test_no_spilling_where_the_cards_suffice() -> None:
    device_map = split_model(max_memory={0: "100GB", 1: "100GB", "cpu": "100GB"})
    assert set(device_map.values()) == {0, 1}


@pytest.mark.parametrize(
    ("max_memory", "figures"),
    [
        ({0: "24GB", 1: "24GB"}, ["158.76 GB", "GPU 0 21.60 GB", "GPU 1 21.60 GB", "10%", "bfloat16"]),
        ({0: "24GB", "cpu": "10GB"}, ["GPU 0 21.60 GB; cpu 10.00 GB"]),
        ({"cpu": "100GB"}, ["cpu 100.00 GB"]),
        ({0: "10GB"}, ["vision_model, 12.11 GB", "GPU 0 9.00 GB"]),
        ({0: 0}, ["GPU 0 0.00 GB"]),
    ],
)
def test_what_does_not_fit_is_an_error_with_figures(max_memory: dict[Any, Any], figures: list[str]) -> None:
    with pytest.raises(ValueError, match="does not fit") as error:
        split_model(max_memory=max_memory)
    for figure in figures:
        assert figure in str(error.value)


def test_real_cards_count_with_their_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, "80GB", "40GB", "80GB")
    used = gigabytes(split_model())
    assert used[1] < used[0]
    assert set(split_model(max_memory={"cpu": "1TB"}).values()) == {0, 1, 2}
    with pytest.raises(ValueError, match="GPU 1 36"):
        split_model(world_size=2, max_memory={"cpu": "1GB"})


def test_real_cards_that_do_not_suffice_spill_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, "80GB", host="200GB")
    with pytest.warns(UserWarning, match=r"does not suffice: \d+ modules \(\d+\.\d\d GB\)"):
        device_map = split_model()
    assert set(device_map.values()) == {0, "cpu"}
    with_gpus(monkeypatch, "80GB", host="10GB")
    with pytest.raises(ValueError, match="cpu 10"):
        split_model()


def test_more_cards_than_here_count_as_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, "1GB")
    assert split_model(world_size=4) == split_model(max_memory=dict.fromkeys(range(4), "1TB"))


def test_cards_that_do_not_tell_their_memory_count_as_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, None, None)
    assert set(split_model().values()) == {0, 1}


def test_this_machine_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    count = device_map_module._count_gpus()
    assert count >= 0
    assert all(isinstance(device_map_module._free_gpu_memory(gpu), int | None) for gpu in range(count))
    assert device_map_module._free_host_memory() > 0


def test_without_cards_all_is_on_the_host() -> None:
    assert set(split_model().values()) == {"cpu"}


@pytest.mark.parametrize("name", ["InternVL-Chat-V1-2", "OpenGVLab/InternVL-Chat-V1-2", "InternVL-Chat-V1-2-Plus"])
def test_names_of_the_documents_have_60_layers(name: str) -> None:
    device_map = split_model(name, world_size=2)
    assert len(layer_devices(device_map)) == 60
    assert split_model(name, world_size=2, policy="documents")[f"{LAYERS}.59"] == 0


def test_a_checkpoint_folder_is_split_by_its_config(tmp_path: Path, recipe: ModuleType) -> None:
    (tmp_path / "config.json").write_text(json.dumps(recipe.config_dict("base")))
    assert len(layer_devices(split_model(tmp_path, world_size=2))) == 3
    assert split_model(str(tmp_path), world_size=2) == split_model(config=recipe.config_dict("base"), world_size=2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model_name": "InternVL-Chat-V9"}, "Unknown model 'InternVL-Chat-V9'"),
        ({"model_name": "InternVL-Chat-V1-2", "config": {}}, "one of them"),
        ({"policy": "fair"}, "policy is 'fair'"),
        ({"headroom": 1}, "headroom is 1"),
        ({"world_size": -1}, "world_size is -1"),
        ({"world_size": 3, "max_memory": {0: "24GB"}}, "lists 1 GPUs"),
        ({"max_memory": {"cuda:0": "24GB"}}, "key 'cuda:0'"),
        ({"max_memory": {-1: "24GB"}}, "key -1"),
        ({"max_memory": {0: "24 apples"}}, "'24 apples' not understood"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"config": {"model_type": "llava"}}, "'llava'"),
    ],
)
def test_wrong_arguments_are_errors(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_model(**kwargs)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(5, 5), (2.5, 2), ("7B", 7), ("24GB", 24 * 10**9), ("24 gib", 24 * 2**30), ("1.5TB", 15 * 10**11), ("3KiB", 3072)],
)
def test_memory_sizes(size: Any, expected: int) -> None:
    assert parse_memory(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "24", "-1GB", "24GBs", "nanGB", -1, math.inf, math.nan, True, "1e3GB"])
def test_no_memory_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match="not understood"):
        parse_memory(size)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, 158.76), ("float32", 317.52), ("auto", 158.76)])
def test_dtypes(dtype: Any, expected: float) -> None:
    assert sum(module_sizes(None, dtype).values()) / 1e9 == pytest.approx(expected, abs=0.01)


def test_quantised_layers_are_smaller_and_the_rest_is_not() -> None:
    plain, eight, four = module_sizes(), module_sizes(None, "int8"), module_sizes(None, "int4")
    assert [eight[part] for part in ENDS] == [plain[part] for part in ENDS]
    assert eight[f"{LAYERS}.0"] / plain[f"{LAYERS}.0"] == pytest.approx(0.5, abs=0.001)
    assert four[f"{LAYERS}.0"] / plain[f"{LAYERS}.0"] == pytest.approx(0.5625 / 2, abs=0.001)


def test_a_tied_head_goes_with_the_embeddings(recipe: ModuleType) -> None:
    config = recipe.config_dict("base")
    config["llm_config"]["tie_word_embeddings"] = True
    assert module_sizes(config)["language_model.lm_head"] == 0
    device_map = split_model(config=config, world_size=3)
    assert device_map["language_model.lm_head"] == device_map["language_model.model.embed_tokens"] == 0
    assert device_map["language_model.model.norm"] == 2


def test_memory_per_device_reads_coarse_maps_and_refuses_holes() -> None:
    assert memory_per_device({"": 0}) == {0: sum(module_sizes().values())}
    coarse = memory_per_device({"vision_model": 1, "mlp1": 1, "language_model": 0})
    assert coarse[1] == module_sizes()["vision_model"] + module_sizes()["mlp1"]
    with pytest.raises(ValueError, match="leaves out"):
        memory_per_device({"vision_model": 0})


def test_every_key_is_a_module_and_every_weight_is_placed(base_model: nvlm.NVLM_D_Model) -> None:
    device_map = split_model(config=base_model.config, world_size=3)
    for part in device_map:
        base_model.get_submodule(part)
    check_device_map(base_model, device_map)


def test_a_model_loads_by_such_a_map_and_answers_the_same(
    base_model: nvlm.NVLM_D_Model, load_model: Callable[..., nvlm.NVLM_D_Model], tmp_path: Path
) -> None:
    sizes = module_sizes(base_model.config, "float32")
    host = sum(sizes.values()) - sizes[f"{LAYERS}.2"]  # all but one layer
    device_map = split_model(config=base_model.config, dtype="float32", max_memory={"cpu": host, "disk": "1GB"})
    assert device_map[f"{LAYERS}.2"] == "disk"
    model = load_model("base", device_map=device_map, offload_folder=tmp_path, drop_dummy_heads=False)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, base_model(input_ids=ids).logits)
