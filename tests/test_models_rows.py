"""Rows are shared where the base model was measured to keep their pieces apart, and nowhere else.

The reference is stock transformers on prompt and answer, or on a document, alone: float32, 1e-4 nats.
"""

from __future__ import annotations

import copy
import itertools
import os
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from config import BaseModelSection, TrainSection
from tests.support import PRESET, plain_tokenizer, random_factors, temporary_directory
from utils import cli, logger
from utils.composition.dev_losses import DevData, DevProbe
from utils.data.batches import PackedDocuments
from utils.evaluation import scored_rows
from utils.evaluation.scored_rows import ModelRow
from utils.exceptions import ArtefactError
from utils.inference import scoring
from utils.models import losses, sources
from utils.models.base_model import BaseModel
from utils.models.rows import row_differences, row_probe, row_support
from utils.models.rows.row_support import PLAIN_ROWS
from utils.training import training_run

SHAPE = {"vocab_size": 768, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "bos_token_id": 0}
SHAPE |= {"eos_token_id": 1, "pad_token_id": 2}
WIDE = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512}
HEADS = {**WIDE, "head_dim": 8}
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "intermediate_size": 48}
# class -> (settings, what the model has to be found to honour)
EXPECTED: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "Llama": (WIDE, ("positions", "mask", "fused")),
    "Falcon": (SHAPE, ("mask", "mask", "fused")),
    "Bloom": ({**SHAPE, "n_layer": 2, "n_head": 4}, ("none", "none", "fused")),
    # its window is longer than any row of the probe until the probe shortens it
    "Gemma3Text": ({**HEADS, "sliding_window": 256}, ("positions", "layer_masks", "fused")),
    # its layers hold the same tensors, and config.json says in words of its own which of them has a window
    "GPTNeo": (
        {**SHAPE, "attention_types": [[["global", "local"], 1]], "window_size": 24, "max_position_embeddings": 512},
        ("positions", "none", "fused"),
    ),
    "GptOss": (
        {**HEADS, "sliding_window": 200, "num_local_experts": 3, "num_experts_per_tok": 2},
        ("layer_masks", "layer_masks", "fused"),
    ),
    # its decoder is not what transformers calls so
    "Llama4Text": (
        {**HEADS, "intermediate_size_mlp": 48, "num_local_experts": 3, "num_experts_per_tok": 1},
        ("positions", "layer_masks", "fused"),
    ),
    # the numbers of its positions are read off a mask
    "OPT": ({**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32}, ("mask", "mask", "fused")),
    "Mamba": ({**SHAPE, "state_size": 8}, ("none", "none", "fused")),
    "Qwen3_5Text": ({**HEADS, **LINEAR, "num_hidden_layers": 4}, ("none", "none", "fused")),
    "RecurrentGemma": (
        {**SHAPE, "num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1, "attention_window_size": 200}
        | {"intermediate_size": 96},
        ("none", "none", "model"),
    ),
}


def awake(model: torch.nn.Module, size: float = 4.0) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(10.0 if "embed" in name else size)
    return model.eval().requires_grad_(False)


def saved(model: Any) -> BaseModel:
    directory = temporary_directory() / "base"
    with logger.quiet_transformers():
        model.save_pretrained(directory)
        plain_tokenizer().save_pretrained(directory)
    return sources.fetch(section(directory), directory.parent / "models")


def section(directory: Path, attention: str = "sdpa") -> BaseModelSection:
    return BaseModelSection(source=str(directory), dtype="float32", attention=attention)


def built(name: str) -> Any:
    torch.manual_seed(7)
    settings = getattr(transformers, f"{name}Config")(**EXPECTED[name][0])
    return awake(getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(settings))


def own_nll(model: Any, tokens: list[int]) -> torch.Tensor:
    """Stock transformers, these tokens alone: NLL of each but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    return F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")


def some(count: int, seed: int) -> list[int]:
    return torch.randint(3, 768, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def question(prompt: int, seed: int) -> scoring.Question:
    candidates = tuple(tuple(some(count, seed + count)) for count in (7, 3, 11, 5))
    return scoring.Question(f"q{seed}", "d", tuple(some(prompt, seed)), candidates, 1, (0, 1, 2, 3), 0)


def documents(packs: bool) -> PackedDocuments:
    texts = [some(count, 50 + count) for count in (30, 61, 9, 44, 90)]
    rows = [{"id": f"d{i}", "input_ids": t, "num_tokens": len(t), "utf8_bytes": 1} for i, t in enumerate(texts)]
    train = TrainSection(max_sequence_tokens=96, batch_tokens=192, micro_batch_tokens=192)
    return PackedDocuments(Dataset.from_list(rows), train, 3, 2, packs=packs)


class MeasuredAgain(Exception):
    """No error of a model, which would be one that cannot be probed."""


class Measured(unittest.TestCase):
    """Each of these architectures is silently wrong, or slow, when it is taken for another."""

    def test_every_way_is_found_that_a_model_honours_and_every_score_is_that_of_a_row_alone(self) -> None:
        for name, (_, expected) in EXPECTED.items():
            with self.subTest(name):
                plain = built(name)
                base = saved(plain)
                how = section(base.directory, "sdpa" if type(plain)._supports_sdpa else "eager")
                with self.assertLogs("adapters", "INFO"):
                    model = row_probe.load_model(base, how)
                found = row_support.of(model)
                self.assertEqual((found.packing, found.candidates, found.head), expected, found.measured)
                self.check_scores(plain, model)

    def check_scores(self, plain: Any, model: Any) -> None:
        """Prompts of 280 tokens are longer than any window here."""
        cpu = torch.device("cpu")
        items = [question(280, 1), question(20, 2)]
        scores = scoring.score_questions(model, items, batch_tokens=700, pad_id=2, device=cpu, what="items")
        for item, score in zip(items, scores, strict=True):
            alone = [own_nll(plain, [*item.prompt, *c])[-len(c) :] for c in item.candidates]
            self.assertAlmostEqual(score.end_nll, float(alone[0][-1]), delta=1e-4)
            for nll, each in zip(score.choice_nlls, alone, strict=True):
                self.assertAlmostEqual(nll, float(each[1:-1].sum()), delta=1e-4 * len(each))
        packed = documents(packs=True)
        found = scoring.score_documents(model, packed, batch_tokens=200, device=cpu, what="documents")
        rows = packed.documents.with_format(None)
        for score, row in zip(found, rows, strict=True):
            alone = own_nll(plain, row["input_ids"])
            self.assertAlmostEqual(score.nll, float(alone.sum()), delta=1e-4 * len(alone))
        # what is trained: the loss of every batch, over an epoch
        data = documents(packs=row_support.of(model).packs)
        batches = [data.batch(0, rows) for step in data.steps(0) for rows in step]
        loss = sum(float(losses.NextTokenLoss(model)(b.input_ids_BT, b.position_ids_BT, b.labels_BT)) for b in batches)
        expected = sum(float(own_nll(plain, row["input_ids"]).sum()) for row in rows)
        self.assertAlmostEqual(loss, expected, delta=1e-4 * sum(b.num_labels for b in batches))
        self.assertEqual(sum(data.num_labels(0, step) for step in data.steps(0)), sum(b.num_labels for b in batches))

    def test_taken_for_a_plain_decoder_it_would_be_wrong(self) -> None:
        """The checks above can fail: they do, where nothing was measured."""
        model = built("Falcon")
        row_support.attach(model, PLAIN_ROWS)
        with self.assertRaises(AssertionError):
            self.check_scores(built("Falcon"), model)

    def test_the_probe_runs_once_for_a_base_an_attention_and_a_version_of_transformers(self) -> None:
        base = saved(built("Llama"))
        first = row_probe.measured(base, section(base.directory))
        with mock.patch.object(row_differences, "measure", side_effect=MeasuredAgain):
            self.assertEqual(row_probe.measured(base, section(base.directory)), first)
            with self.assertRaises(MeasuredAgain):
                row_probe.measured(base, section(base.directory, "eager"))
        of = row_probe._key(base, section(base.directory))
        with mock.patch("importlib.metadata.version", return_value="6.0"):
            self.assertNotEqual(row_probe._key(base, section(base.directory)), of)
        left = [path.name for path in (base.directory.parent / "models" / "base").rglob("*") if "sample" in path.name]
        self.assertEqual(left, [])

    def test_what_cannot_be_probed_shares_no_row_and_is_tried_again(self) -> None:
        base = saved(built("Llama"))
        for error in (MemoryError(), ValueError("no such kernel")):
            row_probe._mentioned.clear()
            with (
                mock.patch.object(row_differences, "measure", side_effect=error),
                self.assertLogs("adapters", "WARNING"),
            ):
                found = row_probe.measured(base, section(base.directory))
            self.assertEqual((found.packing, found.candidates, found.head), ("none", "none", "model"))
            self.assertTrue(found.why)
        self.assertTrue(row_probe.measured(base, section(base.directory)).packs)

    def test_the_probe_of_a_rank_has_values_whatever_the_launcher_asks_for(self) -> None:
        base, seen = saved(built("Llama")), []
        original = row_probe.loading.load_model

        def loaded(*given: Any, **how: Any) -> Any:
            seen.append(os.environ.get(row_probe.SHARDING))
            return original(*given, **how)

        with mock.patch.dict(os.environ, {row_probe.SHARDING: "true"}):
            with mock.patch.object(row_probe.loading, "load_model", loaded):
                self.assertTrue(row_probe.measured(base, section(base.directory)).packs)
            self.assertEqual((seen, os.environ[row_probe.SHARDING]), ([None], "true"))


class Callers(unittest.TestCase):
    """What trains, chooses weights and evaluates loads a base with what was measured on it."""

    def test_every_stage_feeds_rows_as_the_base_was_measured_to_honour_them(self) -> None:
        plain = built("Bloom")
        base = saved(plain)
        flags = ["--base.source", str(base.directory), "--base.dtype", "float32", "--base.attention", "eager"]
        config = cli.resolve(["--preset", PRESET, *flags], {})
        trained = training_run.load_base(config, "domain", base)
        data = DevData([], [], [], documents(packs=True), 2, 200)
        parts = [random_factors(plain, ("query_key_value",), 2, 4, 1)]
        probe = DevProbe.on(base, config.base, parts, data)
        for model in (trained, probe.model):
            self.assertEqual(row_support.of(model).packing, "none")
        self.assertTrue(all(len(set(batch.names)) == len(batch.names) for batch in probe.document_batches()))
        item = question(30, 3)
        texts = documents(packs=True)
        on = scored_rows.Material([], [item], [], {"heldout": texts}, [], False, "", 2)
        (found,) = scored_rows.score(config, base, [ModelRow("base", None)], on, temporary_directory()).values()
        alone = [float(own_nll(plain, [*item.prompt, *c])[-len(c) :][1:-1].sum()) for c in item.candidates]
        for nll, expected in zip(found["items"][0]["choice_nlls"], alone, strict=True):
            self.assertAlmostEqual(nll, expected, delta=1e-3)
        for given, row in zip(found["heldout"], texts.documents.with_format(None), strict=True):
            self.assertAlmostEqual(given["nll"], float(own_nll(plain, row["input_ids"]).sum()), delta=1e-2)


class OddConfig(PreTrainedConfig):
    model_type = "odd_rows_of_a_test"


class OddBlock(torch.nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.mixer, self.out = torch.nn.Linear(hidden, 3 * hidden), torch.nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
        q, k, v = self.mixer(x)[:, None].chunk(3, dim=-1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)[:, 0])


class OddModel(PreTrainedModel):
    """Heard of nowhere: it ignores position ids and masks, twists its logits, and has names of its own."""

    config_class = OddConfig
    base_model_prefix = "trunk"
    _supports_sdpa = True

    def __init__(self, config: OddConfig):
        super().__init__(config)
        self.words = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.storeys = torch.nn.ModuleList(OddBlock(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.speak = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.words

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.speak

    def get_decoder(self) -> Any:
        def decoder(input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
            x = self.words(input_ids)
            for storey in self.storeys:
                x = storey(x, is_causal=self.config.looks_ahead is False)
            return BaseModelOutputWithPast(last_hidden_state=x)

        return decoder

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **_: Any) -> CausalLMOutputWithPast:
        logits = self.speak(self.get_decoder()(input_ids).last_hidden_state)
        return CausalLMOutputWithPast(logits=5 * torch.tanh(logits / 5))


class UnheardOf(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        AutoConfig.register("odd_rows_of_a_test", OddConfig, exist_ok=True)
        AutoModelForCausalLM.register(OddConfig, OddModel, exist_ok=True)

    def base(self, *, looks_ahead: bool) -> BaseModel:
        torch.manual_seed(2)
        return saved(awake(OddModel(OddConfig(**SHAPE, looks_ahead=looks_ahead))))

    def test_a_model_that_the_code_never_heard_of_is_scored_and_trained_rightly(self) -> None:
        base = self.base(looks_ahead=False)
        model = row_probe.load_model(base, section(base.directory))
        found = row_support.of(model)
        self.assertEqual((found.packing, found.candidates, found.head), ("none", "none", "model"), found)
        Measured.check_scores(self, OddModel.from_pretrained(base.directory), model)  # type: ignore[arg-type]

    def test_a_model_that_looks_ahead_is_refused_at_once(self) -> None:
        base = self.base(looks_ahead=True)
        with self.assertRaisesRegex(ArtefactError, "looks ahead"):
            row_probe.load_model(base, section(base.directory))


def varlen_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **how: Any):
    """As flash attention's variable-length function: causal within the lengths that it is given, else in the row."""
    borders = how.get("cu_seq_lens_q")
    ends = [0, query.shape[2]] if borders is None or not how["max_length_q"] else borders.tolist()
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    parts = [
        F.scaled_dot_product_attention(*(t[:, :, a:b] for t in (query, key, value)), is_causal=True)
        for a, b in itertools.pairwise(ends)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


class VariableLengths(unittest.TestCase):
    def model(self, name: str, attention: Any) -> Any:
        ALL_ATTENTION_FUNCTIONS.register(name, attention)
        torch.manual_seed(1)
        model = awake(LlamaForCausalLM(LlamaConfig(**WIDE)))
        model.config._attn_implementation = name
        return model

    def test_lengths_are_handed_to_attention_that_reads_no_positions(self) -> None:
        model = self.model("varlen_of_a_test", varlen_attention)
        found = row_differences.measure(model, vocabulary=768)
        self.assertEqual((found.packing, found.candidates, found.head), ("varlen", "none", "fused"), found.measured)
        row_support.attach(model, found)
        plain = self.model("varlen_of_a_test", varlen_attention)
        Measured.check_scores(self, plain, model)  # type: ignore[arg-type]

    def test_flash_attention_as_transformers_calls_it_gets_lengths(self) -> None:
        """Transformers' own flash path, with a stand-in for the kernel: of a batch it does not read positions."""

        def varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
                   causal: bool = False, softmax_scale: float | None = None) -> torch.Tensor:  # fmt: skip
            rows = [t.transpose(0, 1)[None] for t in (q, k, v)]
            how = {"cu_seq_lens_q": cu_seqlens_q, "max_length_q": max_seqlen_q}
            return varlen_attention(None, *rows, None, **how)[0][0]

        def flash(q: Any, k: Any, v: Any, causal: bool = False, softmax_scale: float | None = None) -> torch.Tensor:
            return varlen_attention(None, *(t.transpose(1, 2) for t in (q, k, v)), None)[0]

        kernel = {"_flash_fn": flash, "_flash_varlen_fn": varlen, "_loaded_implementation": "flash_attention_2"}
        kernel["_process_flash_kwargs_fn"] = flash_utils._lazy_define_process_function(varlen)
        names = ("_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn", "_process_with_kvcache_kwargs_fn")
        with mock.patch.multiple(flash_utils, create=True, **kernel, **dict.fromkeys(names)):
            torch.manual_seed(1)
            plain = awake(LlamaForCausalLM(LlamaConfig(**WIDE)))
            model = copy.deepcopy(plain)
            model.config._attn_implementation = "flash_attention_2"
            found = row_differences.measure(model, vocabulary=768)
            self.assertEqual((found.packing, found.candidates, found.head), ("varlen", "none", "fused"), found)
            self.assertGreater(found.measured["packing:positions"], 0.01, "two packed rows leak by positions")
            row_support.attach(model, found)
            Measured.check_scores(self, plain, model)  # type: ignore[arg-type]
            narrow = copy.deepcopy(model).to(torch.bfloat16)
            self.assertEqual(row_differences.measure_attention(narrow, vocabulary=768).packing, "varlen")

    def test_without_float32_the_attention_blocks_alone_are_compared_in_bfloat16(self) -> None:
        model = self.model("varlen_of_a_test", varlen_attention).to(torch.bfloat16)
        self.assertEqual(row_differences.measure_attention(model, vocabulary=768).packing, "varlen")

        def deaf(module: Any, *tensors: Any, **how: Any) -> Any:
            return varlen_attention(module, *tensors, **{**how, "cu_seq_lens_q": None})

        model = self.model("deaf_of_a_test", deaf).to(torch.bfloat16)
        found = row_differences.measure_attention(model, vocabulary=768)
        self.assertEqual(found.packing, "none")
        self.assertGreater(min(found.measured.values()), 2 * row_differences.BFLOAT16_TOLERANCE)


if __name__ == "__main__":
    unittest.main()
