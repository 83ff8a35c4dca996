"""Negative log-likelihood of next tokens, with logits computed only where there is a label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from utils.models.parallel import ranks
from utils.models.rows import row_support
from utils.models.rows.row_support import causal
from utils.models.structure import model_class

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

IGNORED = -100
# positions whose logits exist at a time: 25 MB of float32 at a 49k vocabulary, and one shape for every full chunk
CHUNK_POSITIONS = 128
# models with one of these change the logits after the output head; they take the ordinary forward pass
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class NextTokenLoss(torch.nn.Module):
    """Sum of the NLL over the labelled positions, as a module so that distributed wrappers see the forward pass.

    Within `as_before()` the model predicts as it did before it was trained; positions that are kept are held to that.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        as_before: Callable[[], AbstractContextManager[Any]] | None = None,
    ):
        super().__init__()
        self.model, self._as_before = model, as_before

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        kept_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum over labels and, with `kept_BT`, of the divergences from the predictions before, in nats."""
        how = row_support.arguments(self.model, input_ids_BT, position_ids_BT)
        labels_BT = labels_BT.reshape(how["input_ids"].shape)
        has_label_BT = labels_BT != IGNORED
        labels_N = labels_BT[has_label_BT]
        is_plain = _plain_logits(self.model)
        outputs = _hidden(self.model, how) if is_plain else causal(self.model)(**how).logits
        if not is_plain:
            total = F.cross_entropy(outputs[has_label_BT].float(), labels_N, reduction="sum")
        elif len(labels_N):
            head = causal(self.model).get_output_embeddings().weight
            total = FrozenHeadNLL.apply(outputs[has_label_BT], head, labels_N)
        else:
            total = outputs[has_label_BT].float().sum() * 0.0
        if kept_BT is None:
            return total
        return total + self._divergence(outputs, input_ids_BT, position_ids_BT, kept_BT, is_plain=is_plain)

    def _divergence(
        self,
        outputs: torch.Tensor,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        kept_BT: torch.Tensor,
        *,
        is_plain: bool,
    ) -> torch.Tensor:
        """Sum of KL(before || now) over the kept positions (Li and Hoiem 2016, arXiv 1606.09282).

        The same weights without what is trained are the teacher: a second pass, no second model, and only over the rows
        that hold something. `outputs` is what the first pass gave: hidden states, or logits where these are not plain.
        """
        rows_B = kept_BT.any(-1)
        if not rows_B.any():
            if not ranks.is_sharded():
                return outputs.new_zeros((), dtype=torch.float32)
            rows_B = torch.arange(len(rows_B), device=rows_B.device) == 0  # ranks make their passes together
        how = row_support.arguments(self.model, input_ids_BT[rows_B], position_ids_BT[rows_B])
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self._as_before() if self._as_before else nullcontext():
            before = _hidden(self.model, how) if is_plain else causal(self.model)(**how).logits
        self.model.train(was_training)
        before = before[kept_BT[rows_B].reshape(how["input_ids"].shape)]
        now = outputs[kept_BT.reshape(outputs.shape[:-1])]
        if is_plain:
            return FrozenHeadKL.apply(now, before, causal(self.model).get_output_embeddings().weight)
        log_before, log_now = before.float().log_softmax(-1), now.float().log_softmax(-1)
        return F.kl_div(log_now, log_before, reduction="sum", log_target=True)


class FrozenHeadNLL(torch.autograd.Function):
    """Summed NLL of labels under a frozen output head; the gradient is made in the forward pass, chunk by chunk.

    Because the head is frozen, each chunk's logits can be turned into d loss / d hidden = (softmax - onehot) W at once
    and dropped (the idea of Liger's and torch's linear cross-entropy). torch 2.13's own chunked form was measured 1.5x
    slower per step here, its unchunked one 1.2x; see decision_document.md.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, head_VH: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        grad_NH = torch.empty_like(hidden_NH)
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        for at in range(0, len(labels_N), CHUNK_POSITIONS):
            here = slice(at, at + CHUNK_POSITIONS)
            labels_C1 = labels_N[here, None]
            logits_CV = hidden_NH[here].to(head_VH.dtype) @ head_VH.t()
            log_p_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
            total -= log_p_CV.gather(1, labels_C1).sum()
            p_CV = log_p_CV.exp_().scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1.0, dtype=torch.float32))
            grad_NH[here] = (p_CV.to(head_VH.dtype) @ head_VH).to(grad_NH.dtype)
        ctx.save_for_backward(grad_NH)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grad, None, None


class FrozenHeadKL(torch.autograd.Function):
    """Summed KL(before || now) of the next token's distributions under a frozen output head, chunk by chunk.

    As in `FrozenHeadNLL`: the gradient of the logits is (now - before), turned into one of the hidden states at once.
    """

    @staticmethod
    def forward(ctx: Any, now_NH: torch.Tensor, before_NH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
        grad_NH = torch.empty_like(now_NH)
        total = torch.zeros((), dtype=torch.float32, device=now_NH.device)
        for at in range(0, len(now_NH), CHUNK_POSITIONS):
            here = slice(at, at + CHUNK_POSITIONS)
            log_q_CV, log_p_CV = (
                torch.log_softmax(hidden_NH[here].to(head_VH.dtype) @ head_VH.t(), dim=-1, dtype=torch.float32)
                for hidden_NH in (now_NH, before_NH)
            )
            p_CV = log_p_CV.exp()
            total += (p_CV * (log_p_CV - log_q_CV)).sum()
            grad_NH[here] = ((log_q_CV.exp_() - p_CV).to(head_VH.dtype) @ head_VH).to(grad_NH.dtype)
        ctx.save_for_backward(grad_NH)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grad, None, None


@torch.no_grad()
def token_nll(
    model: PeftModel | PreTrainedModel,
    input_ids_BT: torch.Tensor,
    position_ids_BT: torch.Tensor,
    labels_BT: torch.Tensor,
    visible_BTT: torch.Tensor | None = None,
) -> torch.Tensor:
    """NLL in float32 of each labelled position, in row order (N,); logits exist for CHUNK_POSITIONS at a time.

    `visible_BTT` is True where a query may look; without it attention is causal within runs of positions.
    """
    how = row_support.arguments(model, input_ids_BT, position_ids_BT, visible_BTT)
    labels_BT = labels_BT.reshape(how["input_ids"].shape)
    has_label_BT = labels_BT != IGNORED
    labels_N = labels_BT[has_label_BT]
    if not len(labels_N):
        return torch.zeros(0)
    if not _plain_logits(model):
        return F.cross_entropy(causal(model)(**how).logits[has_label_BT].float(), labels_N, reduction="none")
    hidden_NH = _hidden(model, how)[has_label_BT]
    head = causal(model).get_output_embeddings().weight
    parts = [
        F.cross_entropy(F.linear(h.to(head.dtype), head).float(), y, reduction="none")
        for h, y in zip(hidden_NH.split(CHUNK_POSITIONS), labels_N.split(CHUNK_POSITIONS), strict=True)
    ]
    return torch.cat(parts)


@torch.no_grad()
def fused_logits(model: PreTrainedModel, input_ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of whole rows as hidden states times the output head, which not every model stops at."""
    how = {"input_ids": input_ids_BT, "use_cache": False}
    return F.linear(_hidden(model, how), causal(model).get_output_embeddings().weight)


def _hidden(model: Any, how: Mapping[str, Any]) -> torch.Tensor:
    return model_class.decoder(model)(**how).last_hidden_state


def _plain_logits(model: Any) -> bool:
    """Whether the model's logits are just hidden states times the output head, by what is known and was measured."""
    if (
        row_support.of(model).head != "fused"
        or getattr(causal(model).get_output_embeddings(), "bias", None) is not None
    ):
        return False
    settings = causal(model).config.get_text_config()
    return all(getattr(settings, name, None) in (None, 1.0) for name in LOGIT_CHANGES)


@contextmanager
def autocast(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """bfloat16 autocast for PEFT's float32 factors on bfloat16 weights: the factors are cast, not the activations.

    A bare model computes in its own dtype, and `frozen_lora` picks its own: nothing is cast for them.
    """
    from peft.helpers import disable_input_dtype_casting
    from peft.tuners.lora import LoraLayer

    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    if dtype != torch.bfloat16 or not any(isinstance(module, LoraLayer) for module in model.modules()):
        yield
        return
    # PEFT would first cast every activation to the factors' float32, 210 times forward and back in the default model
    with torch.autocast(device.type, torch.bfloat16), disable_input_dtype_casting(model):
        yield
