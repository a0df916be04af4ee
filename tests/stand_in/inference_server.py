"""A small HTTP server with the OpenAI completions API and vLLM's adapter API, which can be made to fail.

It runs in a thread of the test. A completion is `answer(ids)`; log-probabilities are those of a model, if it has one.
"""

import asyncio
import json
import threading

import torch
from aiohttp import web
from transformers import AutoModelForCausalLM, AutoTokenizer


class InferenceServer:
    """Use as `with InferenceServer(folder) as server:`; `server.url` is its address.

    Attributes:
        seen: the parts of every completion request: list of dicts. `served`: how many had a right response.
        keys: the Authorization headers that came: set of str.
        adapters: name -> folder of the loaded adapters.
        hold: no completion request is answered before so many have come.
        load_status: HTTP status of a request to load an adapter.
        headers, status: of responses that are bytes.
        listed: the body of the list of models, if it is not the right one: function of the Authorization header.
        faults: function of a completion request's number from 1 on; it returns None, an HTTP status, or one of "drop"
            (close the connection), "cut" (half of the JSON), "silent" (no response), "drip" (a byte now and then),
            bytes (that body), or a function that changes the response's dict in place.
    """

    def __init__(self, model, name=None, answer=None, faults=None, loras=True, prompt_logprobs=True, port=0):
        self.folder, self.name = str(model), name or str(model)
        self.answer, self.faults, self.prompt_logprobs = answer, faults or (lambda number: None), prompt_logprobs
        self.loras, self.port, self.load_status = loras, port, 200
        self.seen, self.keys, self.adapters, self.served = [], set(), {}, 0
        self.window, self.hold = 4096, 0
        self.headers, self.status, self.listed = {}, 200, None
        self.tokenizer, self.models = AutoTokenizer.from_pretrained(self.folder), {}

    def __enter__(self):
        self._model(self.name)  # not in the first request, whose time-out may be short
        started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), daemon=True)
        self.thread.start()
        assert started.wait(60)
        return self

    def stop(self, *_):
        """Close every connection and stop; also called in the middle of requests."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.ending.set)
            self.thread.join(60)

    __exit__ = stop

    async def _run(self, started):
        self.loop, self.ending = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/completions", self._complete)
        if self.loras:
            app.router.add_post("/v1/load_lora_adapter", self._load)
            app.router.add_post("/v1/unload_lora_adapter", self._unload)
        runner = web.AppRunner(app, shutdown_timeout=0.05)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, backlog=1024)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        started.set()
        await self.ending.wait()
        await runner.cleanup()

    async def _list(self, request):
        if self.listed:
            return web.Response(body=self.listed(request.headers.get("Authorization")))
        names = [{"id": self.name, "root": self.folder, "max_model_len": self.window}]
        return web.json_response({"data": names + [{"id": name} for name in self.adapters]})

    async def _load(self, request):
        body = await request.json()
        if not body or body["lora_name"] in self.adapters:  # as vLLM
            return web.json_response({"error": {"message": "not named, or loaded already"}}, status=400)
        if self.load_status != 200:
            return web.json_response({"error": {"message": "LoRA is not enabled"}}, status=self.load_status)
        self.adapters[body["lora_name"]] = body["lora_path"]
        return web.Response(text="loaded")

    async def _unload(self, request):
        self.adapters.pop((await request.json())["lora_name"])
        return web.Response(text="unloaded")

    async def _complete(self, request):
        body = await request.json()
        self.seen.append(body)
        self.keys.add(request.headers.get("Authorization"))
        if body["model"] not in {self.name, *self.adapters}:
            return web.json_response({"error": {"message": f"there is no model {body['model']}"}}, status=404)
        fault = self.faults(len(self.seen))
        while len(self.seen) < self.hold:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01 * (len(self.seen) % 5))  # answers come out of order
        if fault == "drop":
            if request.transport:  # None once the client has gone
                request.transport.abort()
            return web.Response()
        if fault == "silent":
            await asyncio.sleep(60)
        elif isinstance(fault, int):
            key = request.headers.get("Authorization")
            return web.json_response({"error": {"message": f"a fault, asked with {key}"}}, status=fault)
        if fault == "drip":
            response = web.StreamResponse()
            await response.prepare(request)
            while request.transport:
                await response.write(b" ")
                await asyncio.sleep(0.05)
            return response
        if body.get("echo") and not self.prompt_logprobs:  # as llama.cpp
            fault, self.status = b'{"error": {"code": 500, "message": "Only no echo is supported"}}', 500
        if isinstance(fault, bytes):
            return web.Response(body=fault, headers=self.headers, status=self.status)
        found = self._response(body)
        if callable(fault):
            fault(found)
        text = json.dumps(found)
        if fault == "cut":
            return web.Response(text=text[: len(text) // 2], content_type="application/json")
        self.served += 1
        return web.Response(text=text, content_type="application/json")

    def _response(self, body):
        ids = body["prompt"][0] if isinstance(body["prompt"][0], list) else body["prompt"]
        return {"choices": [{"index": 0, **self._choice(body, ids)}], "usage": {"completion_tokens": 1}}

    def _choice(self, body, ids):
        if not body.get("logprobs"):
            return {"text": self.answer(ids)}
        logprobs = self._model(body["model"])(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        best, token = logprobs.max(-1)
        own = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        logprobs = {
            "tokens": [*map(self._text, ids), self._text(token[-1].item())],
            "token_logprobs": [None, *own.tolist(), best[-1].item()],
            "top_logprobs": [None, *({"": value} for value in best.tolist())],
        }
        last = {"token": logprobs["tokens"][-1], "logprob": logprobs["token_logprobs"][-1]}
        return {"text": "", "logprobs": logprobs if self.prompt_logprobs else {"content": [last]}}  # as llama.cpp

    def _text(self, token):
        return self.tokenizer.decode([token])

    @torch.inference_mode()
    def _model(self, name):
        if name not in self.models:
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
            if name in self.adapters:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, self.adapters[name])
            self.models[name] = model.eval()
        return self.models[name]
