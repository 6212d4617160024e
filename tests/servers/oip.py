"""A small inference server of the Open Inference Protocol with its model repository extension, that can be told to misbehave.

    oip.py --port PORT --repository FOLDER     loads and unloads what lies in the folder
    oip.py --port PORT --model NAME            serves that one model and no other

A model's folder may hold a file `behave` with words: crash-on-load, crash-on-infer, slow-load, leak (each load takes 100
MiB, and no unload gives them back). Environment: DEAF=1 ignores the
signal to stop; CHILD=1 starts a grandchild in a session of its own; HANG=1 never becomes ready; NOTES=FOLDER is where it
notes what it began: `loads`, `requests`, `pids`, a line each. While there is a file `hang` in that folder it is not ready.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, required=True)
arguments.add_argument("--repository")
arguments.add_argument("--path")
arguments.add_argument("--model")
options = arguments.parse_args()
notes = os.environ.get("NOTES")
loaded = {options.model} if options.model else set()
lock = threading.Lock()
kept = []


def note(book, line):
    if notes:
        with lock, open(os.path.join(notes, book), "a", buffering=1) as file:
            file.write(line + "\n")


def behaviour(model):
    folder = options.path or os.path.join(options.repository or "", model)
    try:
        with open(os.path.join(folder, "behave")) as file:
            return file.read().split()
    except OSError:
        return []


def crash(why):
    print(f"crashing: {why}", file=sys.stderr, flush=True)
    os._exit(42)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=None):
        text = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def body(self):
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def do_GET(self):
        parts = self.path.strip("/").split("/")
        if self.path == "/v2/health/ready" and os.environ.get("HANG"):
            time.sleep(3600)
        elif self.path == "/v2/health/ready" and notes and os.path.exists(os.path.join(notes, "hang")):
            self.answer(503)
        elif parts[:2] == ["v2", "health"]:
            self.answer(200)
        elif parts[:2] == ["v2", "models"] and parts[-1] == "ready":
            self.answer(200 if parts[2] in loaded else 404)
        else:
            self.answer(200, {"name": "small", "extensions": ["model_repository"]})

    def do_POST(self):
        body = self.body()
        parts = self.path.strip("/").split("/")
        if parts[1] == "repository" and parts[2] == "index":
            self.answer(200, [{"name": name, "state": "READY"} for name in sorted(loaded)])
        elif parts[1] == "repository":
            self.repository(parts[3], parts[4])
        elif parts[1] == "models" and parts[2] in loaded:
            self.infer(parts[2], json.loads(body or b"{}"))
        else:
            self.answer(404, {"error": f"no model at {self.path}"})

    def repository(self, model, verb):
        words = behaviour(model)
        if verb == "unload":
            loaded.discard(model)
        else:
            note("loads", model)
            if "crash-on-load" in words:
                crash(f"{model} is loaded")
            if "slow-load" in words:
                time.sleep(0.3)
            if "leak" in words:
                kept.append(b"x" * (100 << 20))
            loaded.add(model)
        self.answer(200)

    def infer(self, model, request):
        note("requests", str(request.get("id", "")))
        if "crash-on-infer" in behaviour(model):
            crash(f"{model} is asked")
        time.sleep(float(request.get("parameters", {}).get("seconds", 0.005)))
        self.answer(200, {"model_name": model, "id": request.get("id", ""), "outputs": [{"name": "pid", "data": [os.getpid()]}]})


if os.environ.get("DEAF"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
note("pids", str(os.getpid()))
if os.environ.get("CHILD"):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    note("pids", str(child.pid))
print(f"listening on {options.port}", flush=True)
ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
