"""Which feature works on which transformers version: every cell of docs/versions.md is the outcome of tests.

python tests/features.py                                # runs all tests on all versions, writes docs/versions.md
python tests/features.py --version 4.57.6 --only cache  # prints the cells of the features that have "cache" in the name
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
TABLE = REPOSITORY / "docs" / "versions.md"
VERSIONS = ("4.57.6", "5.16.1", "5.23.0")

VARIANTS = "test_decoding_variants.py::"
# What to show -> the tests that show it, by their names below tests/. Where a test's name has {version} in it, the
# test itself starts that version, so it is run on the newest.
FEATURES: dict[str, tuple[str, ...]] = {
    "the released code's ids, logits and features": ("test_golden.py",),
    "`AutoModel`, `AutoModelForCausalLM` with remote code": ("test_hub.py",),
    "`AutoProcessor`, `AutoImageProcessor` with remote code": (
        "test_processing.py::test_auto_classes_load_it_from_a_folders_own_code",
    ),
    "`AutoModelForImageTextToText`, `pipeline`": (
        "test_examples.py::test_processor",
        "test_processing.py::test_pipeline",
    ),
    "processor and chat template": ("test_processing.py", "test_image_processing.py"),
    "`chat`, `batch_chat`, streaming": ("test_chat.py",),
    "`ChatSession`": ("test_session.py",),
    "packed batches, shared prefixes": ("test_batching.py", "test_prefix.py"),
    "saving, loading, broken checkpoints": tuple(
        f"test_modeling_nvlm_d.py::test_{name}"
        for name in (
            "saved_and_loaded_equal",
            "kept_dummy_heads_are_saved_under_the_published_names",
            "weights_are_read_once_into_place",
            "intact_shards_load",
            "broken_checkpoint_is_a_clear_error",
            "old_arguments_are_translated",
        )
    ),
    "layers on several devices, on the CPU and on disk": (
        "test_modeling_nvlm_d.py::test_cpu_and_disk_offload_change_nothing",
        "test_modeling_nvlm_d.py::test_automatic_device_map_with_little_memory",
        "test_modeling_nvlm_d.py::test_names_of_no_layer_in_a_device_map_do_no_harm",
        "test_device_map.py",
    ),
    "`generate`: batches, sampling": ("test_generation.py",),
    "beams, `num_return_sequences`": (
        "test_generation.py::test_each_beam_has_its_samples_own_tiles",
        f"{VARIANTS}test_beams_have_their_own_tiles_in_every_cache",
        f"{VARIANTS}test_returned_sequences_have_their_own_tiles_in_every_cache",
    ),
    "prompt lookup": (f"{VARIANTS}test_prompt_lookup_with_pictures_saves_steps",),
    "dynamic and static cache": tuple(
        f"{VARIANTS}test_every_cache_gives_the_same[{kind}]"
        for kind in ("dynamic, given", "dynamic, given without a config", "static", "static, given")
    ),
    "offloaded cache (on a CPU: a plain one)": (
        f"{VARIANTS}test_every_cache_gives_the_same[offloaded]",
        f"{VARIANTS}test_every_cache_gives_the_same[offloaded static]",
        f"{VARIANTS}test_layers_are_really_offloaded",
    ),
    **{
        f"quantised cache: {backend}{needs}": (
            f"{VARIANTS}test_a_quantised_cache_holds_the_decoders_keys_and_values[{backend}]",
            f"{VARIANTS}test_generates_with_a_quantised_cache[{backend}]",
        )
        for backend, needs in (
            ("fp8", ""),
            ("hqq", ""),
            ("quanto", " (`pip install optimum-quanto`)"),
        )
    },
    "going on from a cache": (
        "test_generation.py::test_goes_on_from_a_cache",
        f"{VARIANTS}test_a_padded_batch_goes_on_from_its_cache",
    ),
    "prefill in chunks": (
        f"{VARIANTS}test_prefill_in_chunks_gives_the_same",
        f"{VARIANTS}test_other_ways_to_decode_after_chunks",
        f"{VARIANTS}test_the_decoder_never_reads_more_than_a_chunk",
        f"{VARIANTS}test_chunks_in_chat",
    ),
    "eager attention = SDPA": (
        f"{VARIANTS}test_attention_backends_agree[sdpa-None]",
        f"{VARIANTS}test_attention_backends_agree_in_a_static_cache",
        f"{VARIANTS}test_sdpa_reaches_the_gradients_of_eager_attention",
    ),
    "eager attention = flex attention (dynamic cache; on a CPU without gradients)": (
        f"{VARIANTS}test_attention_backends_agree[flex_attention-None]",
        f"{VARIANTS}test_compiled_flex_attention_agrees",
    ),
    "`torch.compile` of the decode step": (
        f"{VARIANTS}test_the_decode_step_is_one_graph",
        f"{VARIANTS}test_the_decode_step_in_inductor",
    ),
    "`torch.compile` of the encoder": (f"{VARIANTS}test_compiled_encoder",),
    "`torch.export` of the encoder": (f"{VARIANTS}test_exported_encoder",),
    "a training step": (f"{VARIANTS}test_one_step_lowers_the_loss_and_moves_what_is_trained",),
    "gradient checkpointing": (f"{VARIANTS}test_gradient_checkpointing_gives_the_same_gradients",),
    "the two stages on `Trainer`": ("test_training.py", "test_training_data.py"),
    "LoRA (PEFT)": ("test_lora.py",),
    **{
        f"weights in {kind.replace('_', ' ')}": tuple(
            f"test_quantization.py::{test}[{kind}]"
            for test in (
                "test_only_the_decoders_layers_are_quantised",
                "test_close_to_the_full_model_and_not_it",
                "test_chats_with_pictures_and_without",
                "test_saved_and_loaded_equal",
            )
        )
        for kind in ("bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8", "torchao_int4")
    },
    "tensor parallel": ("test_tensor_parallel.py::test_two_processes_answer_as_one[{version}]",),
    "data parallel": ("test_tensor_parallel.py::test_two_processes_answer_in_order",),
    "`nvlm repack`, `extract`, `compose`": (
        "cli/test_repack.py::test_the_golden_models_outputs_are_unchanged",
        "cli/test_extract_compose.py::test_parts_of_the_golden_model_load_and_compute_the_same",
    ),
    "VLMEvalKit's adapter": ("test_vlmevalkit.py",),
    "lmms-eval's model (by its interface; a long test runs lmms-eval 0.7.3 itself)": tuple(
        f"integrations/test_lmms_eval_models.py::test_{name}"
        for name in (
            "the_entry_point_names_classes_of_the_right_kind",
            "answers_are_those_of_chat_in_the_requests_order",
            "until_and_defaults",
            "videos",
            "rounds_go_on_until_the_task_ends_them",
            "the_smallest_number_is_the_likeliest_choice",
            "likelihoods_as_they_are_on_demand",
            "drawing_is_refused",
            "the_batch_size_is_a_number",
            "loading_and_giving_back",
        )
    ),
}

# Why a feature is not there on a version, where its tests fail instead of saying so.
REASONS = {
    (f"weights in torchao {kind}", "4.57.6"): "transformers 4.57 cannot save torchao's weights; all else works"
    for kind in ("int8", "int4")
}


@dataclass(frozen=True)
class Outcome:
    """What became of a test.

    Args:
        name: the test's name below tests/, "cli/test_chat.py::test_a_conversation[x]".
        passed: whether it ran and passed.
        reason: why not.
    """

    name: str
    passed: bool
    reason: str = ""


def shows(outcome: Outcome, test: str) -> bool:
    """Whether an outcome is one of a test's, which may be a folder, a file, or be run with several parameters."""
    return outcome.name == test or outcome.name.startswith((f"{test}/", f"{test}::", f"{test}["))


def read_report(file: Path) -> list[Outcome]:
    """The outcomes in pytest's JUnit file."""
    outcomes = []
    for case in ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        problems = [child for child in case if child.tag in ("failure", "error", "skipped")]
        reason = problems[0].get("message", "").strip().splitlines() if problems else []
        outcomes.append(Outcome(name, passed=not problems, reason=reason[0] if reason else ""))
    return outcomes


def environment_of(version: str) -> dict[str, str]:
    """The variables of a process that has this version of transformers."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if version != installed("transformers"):
        folder = REPOSITORY / ".cache" / f"transformers-{version}"
        if not folder.is_dir():
            raise FileNotFoundError(f"transformers {version} is not installed in {folder}: run `make versions`")
        paths = [str(folder), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "NVLM_OTHER_TRANSFORMERS": version}
    return environment


def run_tests(tests: Iterable[str], version: str) -> list[Outcome]:
    """Run tests on a version of transformers, in a process of their own.

    Raises:
        RuntimeError: pytest itself failed, as where a test does not exist.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [f"tests/{test}" for test in tests]
        code = subprocess.run(command, cwd=REPOSITORY, env=environment_of(version)).returncode
        if code not in (0, 1):
            raise RuntimeError(f"pytest ended with {code} on transformers {version}, see above.")
        return read_report(report)


def cells_of(version: str, features: Iterable[str]) -> dict[str, str]:
    """{feature: "yes" or "no: why"} on a version of transformers."""
    tests = {test for feature in features for test in FEATURES[feature]}
    here = sorted(test for test in tests if "{version}" not in test)
    by_itself = sorted(test.format(version=version) for test in tests if "{version}" in test)
    outcomes = run_tests(here, version) if here else []
    if by_itself:
        outcomes += run_tests(by_itself, installed("transformers"))
    return {feature: cell_of(feature, version, outcomes) for feature in features}


def cell_of(feature: str, version: str, outcomes: list[Outcome]) -> str:
    """ "yes" where every test of a feature ran and passed; "no: why" elsewhere."""
    for test in FEATURES[feature]:
        found = [outcome for outcome in outcomes if shows(outcome, test.format(version=version))]
        if not found:
            raise ValueError(f"No outcome of {test} on transformers {version}.")
        for outcome in found:
            if not outcome.passed:
                return f"no: {REASONS.get((feature, version)) or outcome.reason or 'failed'}"
    return "yes"


def markdown(cells: dict[str, dict[str, str]]) -> str:
    """The table: cells[version][feature], the reasons in notes under it, then the tests of each feature."""
    notes: list[str] = []

    def short(cell: str) -> str:
        if cell == "yes":
            return cell
        note = cell.removeprefix("no: ")
        if note not in notes:
            notes.append(note)
        return f"no [{notes.index(note) + 1}]"

    rows = [f"| {name} | {' | '.join(short(cells[version][name]) for version in VERSIONS)} |" for name in FEATURES]
    head = [f"| transformers | {' | '.join(VERSIONS)} |", f"| --- |{' --- |' * len(VERSIONS)}"]
    tests = [f"- {name}: {', '.join(f'`{test}`' for test in shown)}" for name, shown in FEATURES.items()]
    return "\n".join(
        [
            "# What works on which transformers version",
            "",
            "Written by `python tests/features.py` from the outcomes of the tests that are named below: yes means that",
            f"all of them ran and passed, on a CPU, with torch {installed('torch').split('+')[0]}.",
            "",
            *head,
            *rows,
            "",
            *[f"[{i + 1}] {note}\n" for i, note in enumerate(notes)],
            "## Shown by",
            "",
            *tests,
            "",
        ]
    )


def main() -> None:
    """Run the tests; write the table, or print a part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", choices=VERSIONS, action="append", help="only on this version, prints")
    parser.add_argument("--only", default="", metavar="WORDS", help="only features with these words in them, prints")
    arguments = parser.parse_args()
    features = [name for name in FEATURES if arguments.only in name]
    cells = {version: cells_of(version, features) for version in arguments.version or VERSIONS}
    if arguments.version or arguments.only:
        for name in features:
            print(f"{name}: {', '.join(f'{version} {cells[version][name]}' for version in cells)}")
    else:
        TABLE.write_text(markdown(cells))


if __name__ == "__main__":
    main()
