"""Serves a model over HTTP: OpenAI's API, and a chat page.

  python -m experiments.serve --checkpoint=/models/Baichuan2-7B-Chat --quantize=int8

It listens on this machine only. For others, give --host=0.0.0.0 and a key that clients must
send, by --api_key or, unseen by other users of the machine, by BAICHUAN_JAX_API_KEY. Needs the
extra `serve`. SIGTERM and Ctrl-C let running requests end; a second one does not.
"""

import os
import sys

from absl import app, flags

from baichuan_jax.inference.request import Request
from baichuan_jax.model import cpu
from baichuan_jax.training.metrics import quiet_logs
from experiments import model_flags
from experiments.errors import in_one_line

_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0: any free one.", 0, 65_535)
_SLOTS = flags.DEFINE_integer("slots", 8, "Requests that run at one time.", 1)
_API_KEY = flags.DEFINE_string("api_key", "", "The key; '': of BAICHUAN_JAX_API_KEY, or none.")
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 128, "Requests that may wait for a slot.", 0)
_MAX_BODY_MB = flags.DEFINE_float("max_body_mb", 4, "The largest request, in MiB.", 0.001)

flags.adopt_module_key_flags(model_flags)  # --help shows them


@in_one_line()
def main(_):
    try:
        from baichuan_jax.inference.server import ServerOptions, listen, serve
    except ModuleNotFoundError as error:
        sys.exit(f"The server needs {error.name}: pip install -e '.[serve]'")
    quiet_logs()
    cpu.keep_memory()
    options = ServerOptions(
        host=_HOST.value,
        port=_PORT.value,
        api_key=_API_KEY.value or os.environ.get("BAICHUAN_JAX_API_KEY", ""),
        max_queue=_MAX_QUEUE.value,
        max_body_bytes=int(_MAX_BODY_MB.value * 2**20),
    )
    listen(options).close()  # a port in use is known before the model is loaded
    model = model_flags.load_model(_SLOTS.value)
    model.engine.try_longest()
    # Compiled now, or the first user would wait for it.
    ids = [model.tokenizer.bos_id] * 2
    if model.max_length > len(ids):
        model.engine.generate([Request(ids, max_new_tokens=1)])
    serve(model, options, on_ready=lambda address: _greet(address, model.name, options))


def _greet(address, name, options):
    key = ' -H "Authorization: Bearer $BAICHUAN_JAX_API_KEY"' if options.api_key else ""
    print(f"{name} is served at {address} (chat page) and {address}/v1 (API). Try:")
    body = '{"prompt": "登鹳雀楼->王之涣\\n夜雨寄北->", "max_tokens": 16}'
    print(f"  curl{key} {address}/v1/completions -d '{body}'", flush=True)
    if options.host not in ("127.0.0.1", "::1", "localhost") and not options.api_key:
        print("Anyone who reaches this machine can use it: no key is set.", flush=True)


if __name__ == "__main__":
    app.run(main)
