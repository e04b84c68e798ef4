"""The order of the training documents: the same on all processes, however a step is shared among them."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices

from hf_sparse.recipes.checkpoints import load_beside_adapters_, load_renamed_

# what peft puts into the name of a module that it trains whole
_SAVED = ".modules_to_save.default."


class ByLength(Sampler[int]):
    """Documents of about one length together, in an order that the seed and the epoch alone decide.

    Transformers' own sampler draws from the global generator. Processes move theirs on by what they draw for dropout, which
    depends on how long their documents are, so from the second epoch on each has another order: some documents are read
    twice, others not at all.

    Args:
        lengths: of the documents, in tokens.
        step: documents of one step of the optimizer, on all processes together; at least 1.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], *, step: int, seed: int) -> None:
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next order is for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        drawn = random.Random(f"{self.seed} {self.epoch}").getrandbits(63)
        generator = torch.Generator().manual_seed(drawn)
        return iter(get_length_grouped_indices(list(self.lengths), self.step, generator=generator))


class _Epochs(TrainerCallback):
    """Tells a sampler of each epoch: a loader that goes on in the middle of one, on several processes, does not reach it."""

    def __init__(self, sampler: ByLength) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        # a sum of shares of it may lack a bit
        self._sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class OrderedTrainer(Trainer):
    """Transformers' trainer, with training documents in the order of :class:`ByLength` where they go by length.

    What is judged comes in its own order, which transformers' trainer changes with the other: metrics look documents up.

    Attributes:
        head: names of parameters that learn at a rate of their own.
        head_rate: that rate; None gives them the others'.
    """

    head: frozenset[str] = frozenset()
    head_rate: float | None = None

    def create_optimizer(self, model: Any = None) -> Any:
        optimizer = super().create_optimizer(model)
        if self.head_rate is None:
            return optimizer
        held: Any = self.model if model is None else model
        # an adapter keeps its copy of a head under a longer name
        head = {id(p) for name, p in held.named_parameters() if name.replace(_SAVED, ".").endswith(tuple(self.head))}
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in groups:
            own = [p for p in group["params"] if id(p) in head]
            others = [p for p in group["params"] if id(p) not in head]
            for params, rate in ((others, group["lr"]), (own, self.head_rate)):
                if params:
                    optimizer.add_param_group({**group, "params": params, "lr": rate})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        columns: Sequence[str] = getattr(dataset, "column_names", None) or ()
        if self.args.train_sampling_strategy != "group_by_length" or "input_ids" not in columns:
            return super()._get_train_sampler(train_dataset)
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = ByLength([len(ids) for ids in dataset["input_ids"]], step=step, seed=seed)
        self.add_callback(_Epochs(sampler))
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # several processes share what comes in order by themselves
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def take_over(self, checkpoint: str) -> None:
        """Go on from the last checkpoint of a run that is over: nothing is trained, and the best model is loaded."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        self._load_from_checkpoint(self.state.best_model_checkpoint or checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed(self.state.best_model_checkpoint)

    def _load_renamed(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_renamed_(self.model, checkpoint)
            load_beside_adapters_(self.model, checkpoint)
