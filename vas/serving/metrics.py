"""Prometheus metrics, through Ray's: every node's agent exports them, and the gateway's `/metrics` shows them all."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120]
STEP = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
NATS = [0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
STRENGTHS = [0.5, 1, 2, 3, 5, 10, 20]
WIDTHS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


class EngineMetrics:
    """What a replica of the base model counts."""

    def __init__(self, replica: str) -> None:
        tags = ("replica",)
        self._tags = {"replica": replica}
        self._tokens = Counter("vas_engine_tokens", "Tokens sampled.", tags)
        self._step = Histogram("vas_engine_step_seconds", "Time of a decoding step.", STEP, tags)
        self._batch = Histogram("vas_engine_batch_size", "Responses that got a token in a step.", WIDTHS, tags)
        self._running = Gauge("vas_engine_running", "Responses being decoded.", tags)
        self._waiting = Gauge("vas_engine_waiting", "Responses that wait for room.", tags)
        self._kv = Gauge("vas_engine_kv_bytes", "Bytes of KV held, base and colocated value models.", tags)
        self._asked = Counter("vas_base_calls", "Calls of a base model that can only be called.", tags)
        self._charged = Counter("vas_base_call_tokens", "Tokens that they are charged for.", tags)
        self._cost = {"calls": 0, "tokens": 0}
        self._calls = Histogram(
            "vas_value_call_seconds", "Time of a step's call to a value deployment.", STEP, (*tags, "value_model")
        )

    def step(self, tokens: int, seconds: float, running: int, waiting: int, kv_bytes: int) -> None:
        """Count a step."""
        if tokens:
            self._tokens.inc(tokens, self._tags)
            self._batch.observe(tokens, self._tags)
            self._step.observe(seconds, self._tags)
        self._running.set(running, self._tags)
        self._waiting.set(waiting, self._tags)
        self._kv.set(kv_bytes, self._tags)

    def cost(self, calls: int, tokens: int) -> None:
        """Take note of all that a server has been asked so far."""
        for counter, name, now in ((self._asked, "calls", calls), (self._charged, "tokens", tokens)):
            if now > self._cost[name]:
                counter.inc(now - self._cost[name], self._tags)
                self._cost[name] = now

    def value_call(self, value_model: str, seconds: float) -> None:
        """Count a call to a value model's deployment."""
        self._calls.observe(seconds, self._tags | {"value_model": value_model})


class GatewayMetrics:
    """What a gateway counts."""

    def __init__(self) -> None:
        self._requests = Counter("vas_requests", "Requests by route, status and key.", ("route", "status", "key"))
        self._prompt = Counter("vas_prompt_tokens", "Tokens of prompts.", ("key",))
        self._completion = Counter("vas_completion_tokens", "Tokens sent.", ("key",))
        self._first = Histogram("vas_time_to_first_token_seconds", "From the request to its first token.", SECONDS)
        self._between = Histogram("vas_inter_token_seconds", "Mean time from token to token of a response.", STEP)
        self._seconds = Histogram("vas_request_seconds", "From the request to its end.", SECONDS)
        self._kl = Histogram(
            "vas_guidance_kl_nats", "KL of the guided from the base distribution, of a guided response.", NATS
        )
        self._strength = Histogram(
            "vas_guidance_strength", "Size of the strengths that requests ask for.", STRENGTHS, ("objective", "sign")
        )
        self._failovers = Counter("vas_failovers", "Responses that went on at another replica.")
        self._unguided = Counter("vas_unguided", "Responses that lost a value model and went on as the base model's.")
        self._disconnects = Counter("vas_disconnects", "Clients that left before the end.")

    def request(self, route: str, status: int, key: str, seconds: float) -> None:
        """Count a request at its end."""
        self._requests.inc(1, {"route": route, "status": str(status), "key": key})
        self._seconds.observe(seconds)

    def tokens(self, key: str, prompt: int, completion: int) -> None:
        """Count its tokens."""
        if prompt:
            self._prompt.inc(prompt, {"key": key})
        if completion:
            self._completion.inc(completion, {"key": key})

    def first_token(self, seconds: float) -> None:
        """Count the wait for the first token."""
        self._first.observe(seconds)

    def response(self, seconds_a_token: float | None, kl: float | None) -> None:
        """Count a response at its end; kl: None without guidance."""
        if seconds_a_token is not None:
            self._between.observe(seconds_a_token)
        if kl is not None:
            self._kl.observe(kl)

    def strengths(self, strengths: dict[str, float]) -> None:
        """Count what a request asks for."""
        for name, strength in strengths.items():
            self._strength.observe(abs(strength), {"objective": name, "sign": "-" if strength < 0 else "+"})

    def failover(self) -> None:
        """A replica died under a response."""
        self._failovers.inc()

    def unguided(self) -> None:
        """A response went on without its value model."""
        self._unguided.inc()

    def disconnect(self) -> None:
        """A client left."""
        self._disconnects.inc()
