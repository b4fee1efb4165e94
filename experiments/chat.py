"""Talks with a chat model in the terminal.

  python -m experiments.chat --checkpoint=/models/Baichuan2-7B-Chat

Replies stream; /help shows the commands, Ctrl-C stops a reply, Ctrl-D leaves. With input from
a pipe or a file, each line is a message. How the model samples, where a flag does not say, is
what its generation_config.json says.
"""

from absl import app, flags

from baichuan_jax.inference.terminal import converse
from baichuan_jax.model import cpu
from baichuan_jax.training.metrics import quiet_logs
from experiments import model_flags, sampling_flags
from experiments.errors import in_one_line

_SYSTEM = flags.DEFINE_string("system", "", "The system message (Baichuan 2).")

for _module in (model_flags, sampling_flags):
    flags.adopt_module_key_flags(_module)  # --help shows them


@in_one_line()
def main(_):
    quiet_logs()
    cpu.keep_memory()
    sampling_flags.check()
    model = model_flags.load_model(slots=1)
    converse(
        model,
        system=_SYSTEM.value,
        sampling=sampling_flags.sampling(model, model.chat_defaults),
        max_new_tokens=sampling_flags.MAX_NEW_TOKENS.value,
    )


if __name__ == "__main__":
    app.run(main)
