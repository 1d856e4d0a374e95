"""The paper's step as its formula reads, to time CROW's own against: three whole forwards, then one backward."""

from typing import Any

import torch
from torch import Tensor

from crow.consistency import layer_consistency
from crow.hooks import record
from crow.perturbation import sign_step
from crow.trainer import CrowTrainer


class PublicFormulation(CrowTrainer):
    """Minimizes what the preset `paper` does, on one batch a step."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs["attention_mask"]

        def forward(embeddings: Tensor, labels: Tensor | None = None) -> tuple[Any, Tensor]:
            with record(self._inner) as recording:
                loss = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels, use_cache=False).loss
            return loss, layer_consistency(recording.hidden_states, mask)

        embeddings = self._embed(inputs["input_ids"]).requires_grad_()
        clean, _ = forward(embeddings, inputs["labels"])
        _, consistency = forward(embeddings)
        [gradient] = torch.autograd.grad(consistency, embeddings)
        _, perturbed = forward(embeddings.detach() + sign_step(gradient, self.args.epsilon))
        return clean + self._alpha * perturbed
