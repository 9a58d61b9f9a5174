"""Scores of small tasks at each evaluation."""

from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from model_card.records import shown_metric


class TaskScores(TrainerCallback):
    """Scores of a few tasks at each evaluation, in the log as `eval_TASK_METRIC`. Every rank evaluates all items, so
    that it works with any layout.

    The random state of the run does not change.
    """

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, names: list[str], limit: int, seed: int):
        from ...evaluation import store
        from ...evaluation.tasks import registry

        self.trainer, self.tokenizer, self.seed = trainer, tokenizer, seed
        self.tasks = [(task, store.chosen(task, limit, seed)) for task in registry.build(names, {}, {}, False)]

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Evaluate the tasks and log their scores. Raises Refusal for a task that the model cannot answer."""
        from ...evaluation import store
        from ...evaluation.lm import SharedContextLM, check_generation, run

        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training, scores = model.training, {}
        model.eval()
        lm = SharedContextLM(model, self.tokenizer)
        for task, _ in self.tasks:
            check_generation(lm, task.leaves)
        for task, items in self.tasks:
            samples = store.samples_of(
                task, run(lm, {leaf: task.leaves[leaf] for leaf in items}, items, self.seed, False, False)
            )
            metrics = store.metrics_of(samples)
            metric = shown_metric(metrics)
            scores[f"eval_{task.name}_{metric.replace(',', '_')}"] = metrics[metric]["value"]
        model.train(training)
        self.trainer.log(scores)
