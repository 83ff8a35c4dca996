"""scripts/verify.py: what is whole is trusted, and every change to it or to what it was made from is named."""

from __future__ import annotations

import json
import shutil
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support import forked, last_json, run_script, saved_model, temporary_directory
from tests.whole_pipeline import Whole, whole
from utils.adapters import adapter_files
from utils.artifacts import files, manifests
from utils.export import verification
from utils.export.verification import Verification
from utils.training import checkpoints

ADAPTER = "adapter/adapter_model.safetensors"
FILES = {
    **{"prepared": "task_train.jsonl", "domain": ADAPTER, "task": ADAPTER, "composed": ADAPTER},
    **{"evaluation": "results.json", "merged": "model.safetensors", "base": "model.safetensors"},
}


class Trusted(unittest.TestCase):
    def test_every_artefact_of_the_pipeline_is_trusted_with_everything_that_it_was_made_from(self) -> None:
        place, _ = whole()
        expected = {
            "prepared": {"prepared", "base"},
            "domain": {"prepared", "domain", "base"},
            "task": {"prepared", "domain", "task", "base"},
            "composed": {"prepared", "domain", "task", "composed", "base"},
            "merged": {"prepared", "domain", "task", "composed", "merged", "base"},
            "evaluation": {"prepared", "domain", "task", "baseline", "composed", "evaluation", "base"},
            "base": {"base"},
        }
        for kind, parts in expected.items():
            found = verification.verify(place[kind], place.roots)
            self.assertEqual([str(problem) for problem in found.problems], [], kind)
            self.assertEqual(sorted(found.checked), sorted(str(place[part]) for part in parts), kind)
            self.assertEqual(found.kind, kind)
            self.assertTrue(found.line().startswith(f"to be trusted: {kind} {place[kind]}"), found.line())

    def test_it_says_so_in_one_line_of_json_and_exit_code_0_for_a_path_as_the_first_word(self) -> None:
        place, workspace = whole()
        completed = run_script("verify", str(place["task"] / "adapter"), *place.flags)
        found = last_json(completed)
        self.assertEqual((found["trusted"], found["kind"], found["problems"]), (True, "task", []))
        self.assertTrue(completed.stdout.splitlines()[-2].startswith("to be trusted: task "))
        self.assertEqual(last_json(workspace.run("verify", "--verify.path", str(place["task"])))["trusted"], True)

    def test_a_moved_artefact_finds_its_parents_by_digest(self) -> None:
        copy = whole()[0].copy()
        for kind in ("domain", "prepared"):
            copy[kind].rename(copy[kind].with_name("renamed"))
        found = verification.verify(copy["merged"], copy.roots)
        self.assertEqual([str(problem) for problem in found.problems], [])
        self.assertIn(str(copy["domain"].with_name("renamed")), found.checked)

    def test_a_checkpoint_is_trusted_as_the_step_of_its_run(self) -> None:
        run = temporary_directory() / "run"
        run.mkdir()
        files.write_json(run / "identity.json", {"stage": "domain"})
        weights = {"w": torch.ones(2)}
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
        checkpoints.save(
            run / "checkpoints",
            checkpoints.TrainingState(step=4),
            weights,
            weights,
            checkpoints.optimizer_tensors(optimizer),
            keep=2,
        )
        step = run / "checkpoints" / "step-00000004"
        self.assertTrue(verification.verify(step, ()).trusted)
        step.rename(step.with_name("step-00000008"))
        self.untrusted(verification.verify(step.with_name("step-00000008"), ()), "named after another step")
        files.write_json(run / "identity.json", {"stage": "task"})
        step.with_name("step-00000008").rename(step)
        self.untrusted(verification.verify(step, ()), "checkpoint of another run")

    def test_an_adapter_of_another_tool_is_trusted_for_what_can_be_known_and_the_rest_is_said(self) -> None:
        place, _ = whole()
        foreign = temporary_directory() / "foreign"
        shutil.copytree(place["domain"] / "adapter", foreign)
        found = verification.verify(foreign, place.roots)
        self.assertTrue(found.trusted)
        self.assertIn("who made it, and whether it was changed, cannot be known", found.notes[-1])

    def untrusted(self, found: Verification, *parts: str) -> None:
        text = "\n".join(str(problem) for problem in found.problems)
        self.assertFalse(found.trusted)
        for part in parts:
            self.assertIn(part, text)


class Untrusted(unittest.TestCase):
    """Each change is made to a copy of a whole pipeline, and seen from the merged model at its end."""

    def seen(self, change: Callable[[Whole], object], kind: str = "merged") -> str:
        copy = whole()[0].copy()
        change(copy)
        found = verification.verify(copy[kind], copy.roots)
        self.assertFalse(found.trusted, found.line())
        self.assertIn("NOT to be trusted", found.line())
        return "\n".join(str(problem) for problem in found.problems).replace(str(copy.root), "")

    def test_one_changed_byte_anywhere_in_the_lineage_is_named(self) -> None:
        for kind, file in FILES.items():
            with self.subTest(kind):
                last = "evaluation" if kind == "evaluation" else "merged"
                said = self.seen(lambda copy, kind=kind, file=file: flip(copy[kind] / file), last)
                self.assertIn(f"{getattr(whole()[0], kind)}/{file} was changed after it was written", said)

    def test_a_missing_parent_and_a_missing_base_model_are_named_with_the_flag_that_says_where_they_are(self) -> None:
        said = self.seen(lambda copy: shutil.rmtree(copy["domain"]))
        self.assertIn("was made from the domain run", said)
        self.assertIn("--run.models_dir", said)

        def without_base(copy: Whole) -> None:
            shutil.rmtree(copy["base"])
            for kind in ("prepared", "domain", "task", "composed", "merged"):
                resealed(copy[kind], lambda manifest: manifest["base"].update(directory="/nowhere"))

        self.assertIn("the base model of", self.seen(without_base))

    def test_an_edited_manifest_is_seen_by_its_seal_and_a_forged_seal_by_its_children(self) -> None:
        def edited(copy: Whole) -> None:
            path = copy["domain"] / files.MANIFEST
            path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))

        self.assertIn("manifest.json was edited after it was written", self.seen(edited))

        def forged(copy: Whole) -> None:
            resealed(copy["domain"], lambda manifest: manifest.update(seed=1))

        self.assertIn("the manifest of the domain run is not the one that", self.seen(forged))

        def unsealed(kind: str) -> Callable[[Whole], None]:
            def change(copy: Whole) -> None:
                path = copy[kind] / files.MANIFEST
                files.write_json(path, {k: v for k, v in files.read_json(path).items() if k != manifests.SEAL})

            return change

        self.assertIn("the manifest of the domain run is not the one that", self.seen(unsealed("domain")))
        copy = whole()[0].copy()
        unsealed("merged")(copy)
        found = verification.verify(copy["merged"], copy.roots)
        self.assertTrue(found.trusted, "nobody recorded anything about it")
        self.assertIn("has no seal", found.notes[0])

    def test_a_forged_adapter_with_another_alpha_is_not_the_one_that_its_children_were_made_from(self) -> None:
        def forged(copy: Whole) -> None:
            path = copy["domain"] / "adapter" / "adapter_config.json"
            files.write_json(path, {**files.read_json(path), "lora_alpha": 800})
            manifest = files.read_json(copy["domain"] / files.MANIFEST)
            files.seal(copy["domain"], {k: v for k, v in manifest.items() if k not in ("files", "digest", "seal")})

        self.assertIn("was made from the domain run", self.seen(forged))

    def test_another_base_model_or_tokenizer_in_its_place_is_named(self) -> None:
        other = saved_model("minimax_m2", seed=1).directory

        def weights(copy: Whole) -> None:
            shutil.rmtree(copy["base"])
            shutil.copytree(other, copy["base"])

        self.assertIn("tiny-minimax-m2 is another model than", self.seen(weights))

        def template(copy: Whole) -> None:
            (copy["base"] / files.MANIFEST).unlink()
            path = copy["base"] / "chat_template.jinja"
            path.write_text(path.read_text() + " ")

        self.assertIn("is another tokenizer or chat template than", self.seen(template))

    def test_settings_that_disagree_with_the_lineage_are_named(self) -> None:
        def other_data(copy: Whole) -> None:
            resealed(copy["merged"], lambda manifest: manifest["identity"].update(adapters=["0" * 64]))

        said = self.seen(other_data)
        self.assertIn("its settings name an input that is none of its parents", said)
        self.assertIn("its fingerprint is not that of its settings", said)

        def other_base(copy: Whole) -> None:
            resealed(copy["merged"], lambda manifest: manifest["base"].update(digest="0" * 64))

        said = self.seen(other_base)
        self.assertIn("its settings name another base model than its manifest", said)
        self.assertIn("were made with different base models", said)

    def test_a_leftover_adapter_beside_merged_weights_is_named(self) -> None:
        def leftover(copy: Whole) -> None:
            shutil.copy(copy["domain"] / "adapter" / "adapter_config.json", copy["merged"])

        self.assertIn("merged/adapter_config.json is no part of the artefact", self.seen(leftover))

    def test_a_foreign_parent_that_was_changed_since_is_named(self) -> None:
        place, _ = whole()
        foreign = temporary_directory() / "foreign"
        shutil.copytree(place["domain"] / "adapter", foreign)
        digest = adapter_files.digest(foreign)
        copy = place.copy()
        resealed(
            copy["composed"],
            lambda manifest: manifest.update(parents=[{"kind": "domain", "path": str(foreign), "digest": digest}]),
        )
        said = [str(problem) for problem in verification.verify(copy["composed"], copy.roots).problems]
        self.assertFalse([text for text in said if str(foreign) in text], said)
        settings = files.read_json(foreign / "adapter_config.json")
        files.write_json(foreign / "adapter_config.json", {**settings, "lora_alpha": 800})
        said = [str(problem) for problem in verification.verify(copy["composed"], copy.roots).problems]
        self.assertTrue([text for text in said if f"{foreign}, an adapter of another tool, was changed" in text], said)

    def test_what_is_no_artefact_is_said_to_be_none(self) -> None:
        place = temporary_directory()
        for name, part in (("missing", "no such directory"), ("empty", "nothing")):
            if name == "empty":
                (place / name).mkdir()
            found = verification.verify(place / name, ())
            self.assertIn(part, str(found.problems[0]))
        files.write_json(place / "empty" / "identity.json", {})
        self.assertIn("is an unfinished run", str(verification.verify(place / "empty", ()).problems[0]))

    def test_each_problem_is_a_line_before_the_verdict_and_the_exit_code_is_2(self) -> None:
        copy = whole()[0].copy()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            flip(copy["task"] / "adapter" / name)
        completed = forked("verify", str(copy["merged"]), *copy.flags)
        self.assertEqual(completed.returncode, 2, completed.stderr)
        lines = completed.stdout.strip().splitlines()
        found = json.loads(lines[-1])
        self.assertFalse(found["trusted"])
        self.assertEqual(lines[-2], f"NOT to be trusted: {len(found['problems'])} problems")
        self.assertEqual(lines[:-2], [f"problem: {text}" for text in found["problems"]])
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            self.assertTrue([line for line in lines[:-2] if f"{name} was changed" in line], lines)

    def test_without_a_path_it_says_how_to_call_it(self) -> None:
        completed = forked("verify")
        self.assertEqual((completed.returncode, completed.stdout), (2, ""))
        self.assertIn("python scripts/verify.py PATH", completed.stderr)


def flip(path: Path) -> None:
    """One bit of the last byte but one, where JSON has a brace and weights have a weight."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def resealed(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """What a forger does: change the manifest and compute its seal anew."""
    manifest = files.read_json(directory / files.MANIFEST)
    change(manifest)
    manifest[manifests.SEAL] = manifests.seal(manifest, files.fingerprint)
    files.write_json(directory / files.MANIFEST, manifest)


if __name__ == "__main__":
    unittest.main()
