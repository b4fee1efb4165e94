"""Continues texts with a model.

  python -m experiments.generate --checkpoint=/models/Baichuan2-7B-Base \
    --prompt=$'登鹳雀楼->王之涣\n夜雨寄北->' --max_new_tokens=64 --repetition_penalty=1.1
  python -m experiments.generate --checkpoint=runs/mine --prompts_file=prompts.jsonl \
    --n=4 --temperature=0.8 --seed=1 --out=samples.jsonl

The text of one prompt streams; many share the model, and come in their order. --out gets a
JSON object a line: prompt, text, tokens (their number), finish_reason ('stop' or 'length').
How the model samples, where a flag does not say, is what its generation_config.json says, and
greedy without one.
"""

from absl import app, flags

from baichuan_jax.inference import batch
from baichuan_jax.inference.terminal import show
from baichuan_jax.model import cpu
from baichuan_jax.training.metrics import quiet_logs
from experiments import model_flags, sampling_flags
from experiments.errors import in_one_line

_PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue; may be given again.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", "", "One prompt a line, or .jsonl with a field 'prompt'."
)
_STOP = flags.DEFINE_multi_string("stop", [], "A string that ends the text; may be given again.")
_N = flags.DEFINE_integer("n", 1, "Samples of each prompt; each has the next seed.", 1)
_SLOTS = flags.DEFINE_integer("slots", 8, "Texts that are continued at one time.", 1)
_OUT = flags.DEFINE_string("out", "", "JSONL file to write.")
_LOGPROBS = flags.DEFINE_boolean("logprobs", False, "Token ids and log-probabilities, too.")

for _module in (model_flags, sampling_flags):
    flags.adopt_module_key_flags(_module)  # --help shows them


@in_one_line()
def main(_):
    quiet_logs()
    cpu.keep_memory()
    sampling_flags.check()
    texts = list(_PROMPT.value)
    if _PROMPTS_FILE.value:
        texts += batch.read_prompts(_PROMPTS_FILE.value)
    if not texts:
        raise app.UsageError("Give --prompt or --prompts_file.")
    if _LOGPROBS.value and not _OUT.value:
        raise app.UsageError("--logprobs are written into --out=FILE.jsonl, which is not given.")
    model = model_flags.load_model(min(_SLOTS.value, _N.value * len(texts)))
    jobs = batch.jobs(
        model,
        texts,
        samples=_N.value,
        sampling=sampling_flags.sampling(model, model.defaults),
        max_new_tokens=sampling_flags.MAX_NEW_TOKENS.value,
        stop=tuple(_STOP.value),
    )
    if _OUT.value:
        batch.write(model.engine, jobs, _OUT.value, logprobs=_LOGPROBS.value)
    elif len(jobs) == 1:
        show(model.engine, jobs[0].request, before=texts[0])
    else:
        for job, output in batch.run(model.engine, jobs):
            print(f"\n{job.prompt}⟶{output.text}", flush=True)


if __name__ == "__main__":
    app.run(main)
