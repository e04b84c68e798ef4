"""Imitation: predictors of edges learn to pick what a dense layer attends to, before any other training."""

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.integration.calibrate import checked_batches
from hf_sparse.patterns.edge_predictor import EdgePredictor, Record
from hf_sparse.patterns.parent import check_count


def imitate_(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    steps: int = 100,
    learning_rate: float = 0.003,
) -> PreTrainedModel:
    """Teach the predictors of a model's ``sac`` layers to pick what dense attention attends to, in place.

    All batches are read once while these layers attend to everything: each layer sees the hidden states that it would see if
    it were dense, and notes for each head and source the destinations that get most attention outside of the band, strongest
    first. The predictors then learn to pick these in this order, by cross-entropy with Adam. Nothing else changes. Save the
    model afterwards. A checkpoint that was converted picks at random until this is done or it is trained.

    What is kept of the batches is a vector for each node and layer, and the destinations.

    Args:
        model: a sparse model with the pattern ``sac``, on its own or in a combination.
        batches: what the model is called with; read into a list.
        steps: of the optimizer, at least 1; each takes one batch, in turn.
        learning_rate: of Adam, above 0.

    Returns:
        The same model, in the mode it was in.

    Raises:
        ValueError: if the model has no predictors of edges, there is nothing to learn from, or learning diverges.
        TypeError: if a batch is not what a model is called with, or ``steps`` is no int.
    """
    states = [module for module in model.modules() if isinstance(module, EdgePredictor)]
    held = checked_batches(batches, "imitation")
    if not states:
        raise ValueError(f"{type(model).__name__} has no predictors of edges: none of its layers has the pattern 'sac'")
    check_count(steps, "steps", least=1)
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be above 0 and finite, got {learning_rate}")
    noted = [lines for lines in _noted(model, states, held) if any(lines)]
    if not noted:
        raise ValueError(
            "there is nothing to imitate: the batches hold no tokens, or texts so short that every node is picked"
        )
    # of float32 whatever the model's dtype; the model's own change at the end, all or none
    learners = [copy.deepcopy(state).float().requires_grad_() for state in states]
    optimizer = torch.optim.Adam([p for learner in learners for p in learner.parameters()], lr=learning_rate)
    with torch.enable_grad():
        for step in range(steps):
            lines = noted[step % len(noted)]
            loss = torch.stack([_loss(learner, records) for learner, records in zip(learners, lines, strict=True)])
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    if not all(p.isfinite().all() for learner in learners for p in learner.parameters()):
        raise ValueError(f"imitation diverged and changed nothing; lower learning_rate={learning_rate}")
    for state, learner in zip(states, learners, strict=True):
        state.load_state_dict(learner.state_dict())
    return model


def _noted(
    model: PreTrainedModel, states: list[EdgePredictor], batches: list[Mapping[str, Tensor]]
) -> list[list[list[Record]]]:
    """Return what each state notes of each batch."""
    modes = {module: module.training for module in model.modules()}
    noted = []
    model.eval()
    try:
        for state in states:
            state.is_imitating, state.records = True, []
        for batch in batches:
            with torch.no_grad():
                model(**batch)
            noted.append([state.records for state in states])
            for state in states:
                state.records = []
    finally:
        for state in states:
            state.is_imitating, state.records = False, []
        for module, mode in modes.items():
            module.training = mode
    return noted


def _loss(learner: EdgePredictor, records: list[Record]) -> Tensor:
    """Return the mean cross-entropy of the destinations that one layer noted of a batch."""
    total, count = next(learner.parameters()).new_zeros(()), 0
    for record in records:
        logs = learner.log_probabilities(record.nodes, record.picks, record.is_causal, record.heads)
        total = total - logs.sum()
        count += int((record.picks >= 0).sum())
    return total / max(count, 1)
