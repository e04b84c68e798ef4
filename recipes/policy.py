"""Policy gradient: the loss that teaches SAC's predictors which edges to pick."""

import torch
from torch import Tensor, nn

from hf_sparse.patterns.edge_predictor import EdgePredictor


class PolicyLoss:
    """The REINFORCE loss of the edges that a model picked in its last pass of training.

    Which edges are picked has no gradient of its own. The reward says how good they were, and the loss makes picks of more than
    the usual reward likelier. Call it after each pass and add what it returns to the loss of the task:

        policy = PolicyLoss(model)
        loss = model(**batch).loss
        (loss + policy(-loss)).backward()

    A row's loss is the mean over all its sources, of every layer and head, of the logarithm of how likely their picks were,
    times how far the row's reward is above the baseline, negated; rows are averaged. So neither depth nor length changes its
    size. Predictors alone get a gradient from it. What the model picks again when activations are recomputed is the same, and
    is not counted again.

    Attributes:
        baseline: moving average of the rewards; None before the first, which is its own baseline.

    Args:
        model: with the pattern ``sac`` on some layers, on its own or in a combination; from now on it keeps what a pass of
            training picked until the next pass begins.
        decay: how much of the baseline each call keeps, from 0 to below 1.

    Raises:
        ValueError: if no layer of the model has the pattern ``sac``, or the decay is out of range.

    Source: Li et al. 2020, arXiv:2003.09833, section 3, after Williams 1992. The mean over sources, where the paper has the
    sum over picks, is ours.
    """

    def __init__(self, model: nn.Module, decay: float = 0.99) -> None:
        self._states = [module for module in model.modules() if isinstance(module, EdgePredictor)]
        if not self._states:
            raise ValueError(
                f"{type(model).__name__} has no predictors of edges: none of its layers has the pattern 'sac'"
            )
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.baseline: float | None = None
        self._decay = decay
        for state in self._states:
            state.is_recording = True
        # of a model with a head the base may be called by itself
        for module in dict.fromkeys((model, getattr(model, "base_model", model))):
            module.register_forward_pre_hook(self._forget)

    def __call__(self, reward: float | Tensor) -> Tensor:
        """Return the loss, and take off what was picked.

        Args:
            reward: the larger the better, such as the negative loss of the task; a number, or float ``[B]``, one of each row.

        Returns:
            float, a scalar.

        Raises:
            ValueError: if there was no pass in training mode since the last call, or the rewards are not finite or do not fit
                the rows.
        """
        records = [(state, record) for state in self._states for record in state.records]
        if not records:
            raise ValueError(
                "no edges were picked since the last call; call the model first, in training mode and on a batch with tokens"
            )
        rows = records[0][1].batch
        like = records[0][1].nodes.offered
        held = torch.as_tensor(reward).detach().to(like)
        if held.dim() > 1 or (held.dim() == 1 and len(held) != rows):
            raise ValueError(f"reward must be a number or one for each of {rows} rows, got shape {list(held.shape)}")
        if not held.isfinite().all():
            raise ValueError(f"reward must be finite, got {reward}")
        held = held if held.dim() else held.expand(rows)
        said, sources = torch.zeros_like(held), torch.zeros_like(held)
        for state, record in records:
            logs = state.log_probabilities(record.nodes, record.picks, record.is_causal, record.heads)
            at = torch.arange(len(held), device=held.device)[record.rows]
            said = said.index_add(0, at, logs.sum((1, 2)).to(held))
            sources[record.rows] += logs[0].numel()
        self._forget()
        mean = held.mean().item()
        baseline = mean if self.baseline is None else self.baseline
        self.baseline = self._decay * baseline + (1 - self._decay) * mean
        return -((held - baseline) * said / sources.clamp(min=1)).mean()

    @torch.compiler.disable
    def _forget(self, *_: object) -> None:
        for state in self._states:
            state.records = []
