"""lm-evaluation-harness on a run of any head, an ensemble, a transformers folder, or GPT-2.

    pip install 'lm_eval==0.4.13'
    python harness.py --out_dir=out/quickstart/bayes --tasks=hellaswag,lambada_openai --n_samples=16
    python harness.py --out_dir=out/a+out/b+out/c --tasks=arc_easy,my_task.yaml --limit=100

Prints the harness' table and writes harness.json. The harness downloads a task's data from the
Hugging Face Hub.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from engine.base.errors import UserError, run_main
from engine.base.files import check_writable, write_json
from engine.base.options import Draws, NonNegativeInt, PositiveInt, load_config
from engine.data.tokenizer import END_OF_TEXT
from engine.eval.endings import score_endings
from engine.eval.ensemble import Ensemble, load, members_of
from engine.eval.run import Run, Sampling
from engine.runs.checkpoint import check_tokenizer, folder_of, results_folder

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError:  # main() says how to install it
    TemplateLM = object


@dataclass(frozen=True)
class HarnessConfig:
    # a run, a checkpoint file, a folder of nanoGPT or transformers, gpt2*; A+B is an ensemble
    out_dir: str = "out"
    tasks: str = ""  # the harness' names for them, or .yaml files, separated by commas
    limit: NonNegativeInt = 0  # only the first items of each task; 0: all
    # Bayesian: posterior draws averaged per prediction; 0: the mean weights; -1: all, not sampled
    n_samples: Draws = 0
    batch_size: PositiveInt = 64  # texts at a time: speed and memory
    results: str = ""  # folder for harness.json; default: that of the run, or of the first one
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto


class HarnessLM(TemplateLM):
    """A model as lm-evaluation-harness calls it: requests in, log-probabilities or texts out."""

    def __init__(self, config: HarnessConfig):
        super().__init__()
        self.config = config
        first, *others = members_of(config.out_dir)
        self.run = Run(first, config.device, "float32")
        if others:
            self.run.model = load(config.out_dir)[0].to(self.run.device)
        for source in others:
            check_tokenizer(source, folder_of(first))
        self.run.with_limit(Sampling(n_samples=config.n_samples))  # refuses draws of point weights

    @property
    def eot_token_id(self) -> int:
        """The token before a text without context."""
        return self.run.encode("")[0]

    def tok_encode(self, string: str, **_) -> list[int]:
        return self.run.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests, **_):
        items = [(context or [self.eot_token_id], [ending]) for _, context, ending in requests]
        batch_size, n_samples = self.config.batch_size, self.config.n_samples
        sums, greedy = score_endings(self.run.model, items, batch_size, n_samples)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        """log p of each text, read in consecutive windows of block_size."""
        size = self.run.model.config.block_size
        sums = []
        for request in requests:
            ids = [self.eot_token_id, *self.tok_encode(*request.args)]
            starts = range(1, len(ids), size)
            windows = [(None, ids[max(0, i - size) : i], ids[i : i + size]) for i in starts]
            sums.append(sum(log_p for log_p, _ in self._loglikelihood_tokens(windows)))
        return sums

    def generate_until(self, requests: list) -> list[str]:
        """Continue each context up to the first of its stop strings."""
        if isinstance(self.run.model, Ensemble):
            raise UserError("an ensemble cannot generate text; leave out tasks that generate")
        texts = []
        for request in requests:
            context, asked = request.args
            asked = normalize_gen_kwargs(asked)
            stops = [*asked["until"], END_OF_TEXT]
            length, temperature = asked["max_gen_toks"], asked.get("temperature", 0.0)
            sampling = Sampling(length, temperature, 0, n_samples=self.config.n_samples)
            for (text,) in self.run.stream(context, 1, sampling, uncertain=False):
                ends = [text.text.find(stop) for stop in stops if stop in text.text]
                if ends:
                    break
            texts.append(text.text[: min(ends, default=None)])
        return texts


def main() -> None:
    config, _ = load_config(HarnessConfig, sys.argv[1:])
    if TemplateLM is object:
        raise UserError("lm_eval is not installed; run: pip install 'lm_eval==0.4.13'")
    manager = TaskManager()
    tasks = config.tasks.split(",")
    for task in tasks:
        if task not in manager.all_tasks and not Path(task).is_file():
            raise UserError(f"the harness has no task {task!r}; `lm_eval ls tasks` lists all")
    folder = Path(config.results or results_folder(members_of(config.out_dir)[0]))
    check_writable(folder, "results")
    model, limit = HarnessLM(config), config.limit or None
    found = simple_evaluate(model, tasks=tasks, limit=limit, task_manager=manager)
    print(make_table(found))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "harness.json", vars(config) | found["results"])


if __name__ == "__main__":
    run_main(main)
