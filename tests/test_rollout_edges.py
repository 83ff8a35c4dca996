"""The rollout's parts at the edge: configuration and shares of the balancer, log lines, answers, journal, files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import yaml

from config import Config, RolloutSection
from tests.rollout_support import NEW, OLD, QUESTIONS, ROOT, RolloutTest, Stub, has_haproxy, until
from utils import cli
from utils.data import answer_metrics
from utils.exceptions import ArtefactError, BalancerError, ConfigError, DataError
from utils.rollout import kubernetes
from utils.rollout.controller import Observation, replay
from utils.rollout.edge import golden, journal, rollout_report, screen, servers
from utils.rollout.edge.balancer import haproxy, haproxy_configuration
from utils.rollout.edge.balancer.haproxy import Balancer, find_binary
from utils.rollout.edge.balancer.haproxy_configuration import Layout, Server
from utils.rollout.edge.balancer.old_workers import DrainWatch
from utils.rollout.edge.journal import Journal
from utils.rollout.edge.load import Load
from utils.rollout.edge.request_log import Collector, LogSink, completed
from utils.rollout.edge.servers import ServerAnswer
from utils.rollout.edge.service import policy_of
from utils.rollout.gate import Counts
from utils.rollout.policy import UNITS, Policy


def line(**changes: Any) -> bytes:
    plain = {"t": 4_000_000_000_000, "be": "canary", "st": 200, "ts": "--", "Tr": 5, "Ta": 50, "B": 500, "rc": "0"}
    return json.dumps(plain | {"u": "-", "bp": "100", "in": "1"} | changes).encode()


def rates(*lines: bytes, collector: Collector | None = None) -> dict[str, tuple[int, int]]:
    return dict((collector or Collector()).count(lines).rates.get(100, {}))


class Claims(unittest.TestCase):
    """What a server says of itself goes into the balancer's configuration, which can read the environment."""

    def test_only_a_digest_is_taken_for_one(self) -> None:
        for claimed in ("${HF_TOKEN}", "%[env(HF_TOKEN)]", "d" * 63, "d" * 65, "D" * 64, 'd"', "", "d" * 64 + "\nx"):
            self.assertEqual(servers.claimed_digest({"x-model-digest": claimed}), "", claimed)
        self.assertEqual(servers.claimed_digest({"x-model-digest": "d" * 64}), "d" * 64)
        self.assertEqual(servers.claimed_digest({}), "")

    def test_no_other_text_becomes_configuration(self) -> None:
        for digest in ("${HF_TOKEN}", "%[env(HF_TOKEN)]", "x" * 64):
            layout = Layout(Server("127.0.0.1:1", digest), None, 1)
            with self.assertRaisesRegex(BalancerError, "64 hexadecimal digits"):
                haproxy_configuration.configuration(layout)

    def test_settings_are_held_to_the_same(self) -> None:
        address = "http://127.0.0.1:8000"
        for wrong in (
            {"candidate_digest": "${HF_TOKEN}"},
            {"candidate": "http://a b:80"},
            {"candidate": "http://h:1/x"},
        ):
            with self.assertRaises(ValueError):
                Config(rollout=RolloutSection(**({"candidate": address} | wrong)))
        for right in (address, f"{address}/", f"{address}/v1", f"{address}/v1/", "http://[::1]:8000"):
            Config(rollout=RolloutSection(candidate=right, candidate_digest="d" * 64))

    def test_haproxy_is_given_no_secret(self) -> None:
        with unittest.mock.patch.dict(os.environ, HF_TOKEN="hf_secret", PATH="/usr/bin"):
            self.assertEqual(set(haproxy.environment()) - {"LD_LIBRARY_PATH", "TZ"}, {"PATH"})


class HostileServers(unittest.TestCase):
    """Whatever a server says is an error of a probe: in time, within memory, and never an exception."""

    HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"

    def server(self, speak: Callable[[socket.socket], None]) -> str:
        listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.addCleanup(listening.close)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.recv(1 << 16)
                speak(connection)
                # closed with a part of the request unread, the answer would be lost on its way
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass

        threading.Thread(target=accept, daemon=True).start()
        return f"127.0.0.1:{listening.getsockname()[1]}"

    def asked(self, speak: Callable[[socket.socket], None], timeout_s: float = 1.0) -> tuple[ServerAnswer, float]:
        start = time.monotonic()
        found = servers.ask(self.server(speak), [], max_tokens=1, timeout_s=timeout_s)
        return found, time.monotonic() - start

    def test_a_server_that_drips_ends_with_the_time(self) -> None:
        def drip(connection: socket.socket, begin: bytes) -> None:
            connection.sendall(begin)
            while True:
                connection.sendall(b"x")
                time.sleep(0.05)

        for begin in (b"", b"HTTP/1.1 200 OK\r\nx: ", self.HEAD, self.HEAD + b"data: "):
            found, seconds = self.asked(functools.partial(drip, begin=begin))
            self.assertEqual(found.error, "timeout", begin)
            self.assertLess(seconds, 10, begin)
            address = self.server(functools.partial(drip, begin=begin))
            begun = time.monotonic()
            servers.get(address, "/health", 1.0)
            self.assertEqual(servers.served_digest(address), "")
            self.assertLess(time.monotonic() - begun, 20, begin)

    def test_an_endless_line_is_not_kept(self) -> None:
        def pour(connection: socket.socket) -> None:
            connection.sendall(self.HEAD + b"data: ")
            while True:
                connection.sendall(b"x" * 65536)

        found, _ = self.asked(pour, timeout_s=30)
        self.assertIn("more bytes", found.error)

    def test_chunks_of_no_size_are_errors_and_not_kept(self) -> None:
        # to http.client a chunk of -1 bytes is all that ever comes
        for size in (b"-1", b"-5", b"7fffffffffffffffffff", b"fffffffff"):
            sent = [0]

            def pour(connection: socket.socket, size: bytes = size, sent: list[int] = sent) -> None:
                connection.sendall(self.HEAD.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n"))
                connection.sendall(size + b"\r\n")
                while sent[0] < 1 << 28:
                    connection.sendall(b"x" * 65536)
                    sent[0] += 65536

            found, _ = self.asked(pour, timeout_s=20)
            self.assertRegex(found.error, "a chunk of", size)
            self.assertLess(sent[0], 1 << 26, size)
            address = self.server(pour)
            self.assertEqual((servers.get(address, "/health"), servers.served_digest(address)), ((0, b""), ""))

    def test_halves_of_characters_and_endless_answers_are_texts_that_can_be_compared_and_written(self) -> None:
        def stream(*pieces: str, finish: str = '"stop"') -> ServerAnswer:
            events = "".join(f'data: {{"choices":[{{"delta":{{"content":"{piece}"}}}}]}}\n\n' for piece in pieces)
            end = f'data: {{"choices":[{{"delta":{{}},"finish_reason":{finish}}}]}}\n\ndata: [DONE]\n\n'
            return self.asked(lambda c: c.sendall(self.HEAD + (events + end).encode()), timeout_s=20)[0]

        self.assertEqual(stream("\\ud800x").text, "\ufffdx")
        self.assertEqual(stream("\\ud83d", "\\ude00").text, "\U0001f600")
        self.assertIn("cut", stream("x", finish='{"a":1}').error)
        long = stream(*["a b " * 1000] * 300)
        self.assertEqual((len(long.text), long.error), (servers.MOST_TEXT, ""))
        prompt = golden.Prompt("p", ({"role": "user", "content": "q"},), ("gold",))
        for answer in (stream("\\ud800x"), long):
            golden.compare(prompt, answer, ServerAnswer("gold", "stop"), 0.2)
            answer.text.encode()

    def test_a_thousand_malformed_answers_are_errors_or_answers(self) -> None:
        generator = random.Random(0)
        good = b'{"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}'
        known = [b'{"choices":5}', b'{"choices":[{"delta":{"content":5}}]}', b"[" * 200_000, b'{"data":5}', b"\xff"]
        events = [*known, *(self.mutated(good, generator) for _ in range(1000 - len(known)))]
        upcoming = iter(events)

        def speak(connection: socket.socket) -> None:
            connection.sendall(self.HEAD + b"data: " + next(upcoming) + b"\n\ndata: [DONE]\n\n")

        address, wrong = self.server(speak), 0
        for _ in events:
            found = servers.ask(address, [], max_tokens=1, timeout_s=20)
            self.assertIsInstance(found.text, str)
            wrong += bool(found.error)
        self.assertGreater(wrong, 500)

    @staticmethod
    def mutated(text: bytes, generator: random.Random) -> bytes:
        pieces = list(text)
        for _ in range(generator.randint(1, 6)):
            place = generator.randrange(len(pieces))
            change = generator.choice((b"", b"5", b"[", b"}", b"null", b'"', b"\x00", b"1e999", b"{}"))
            pieces[place : place + generator.randint(0, 9)] = change
            pieces = pieces or [32]
        return bytes(pieces).replace(b"\n", b"")

    def test_lists_of_models_that_are_none_name_no_digest(self) -> None:
        roots = b'{"data":[5,{"root":5},{"root":"/"},{"root":"/a\\u0000b"},{"root":"/\\ud800"}]}'
        for body in (b'{"data":5}', roots, b"[" * 200_000, b"5", b"", b"\xff", b'{"data":' + b"9" * 5000 + b"}"):
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
            address = self.server(lambda connection, whole=head + body: connection.sendall(whole))
            self.assertEqual(servers.served_digest(address), "", body[:40])


class LogLines(unittest.TestCase):
    def test_what_is_an_error_and_whose(self) -> None:
        for changes in ({"st": 500}, {"ts": "SD"}, {"ts": "sH", "st": 504}, {"ts": "PR"}, {"rc": "1"}, {"rc": "+1"}):
            self.assertEqual(rates(line(**changes))["errors"], (1, 0), changes)
        for state in ("CD", "cD", "KD"):
            collector = Collector()
            self.assertEqual(rates(line(ts=state), collector=collector), {})
            self.assertEqual(collector.aborted["canary"], 1)
        self.assertEqual(rates(line(st=400, be="production"))["client_errors"], (0, 1))

    def test_a_session_counts_once_per_share_and_errs_once_per_rollout(self) -> None:
        collector = Collector()
        first = rates(*[line(u="a", st=500)] * 5, *[line(u="b")] * 3, line(), line(), collector=collector)
        self.assertEqual((first[UNITS], first["errors"]), ((4, 0), (1, 0)))
        later = collector.count([line(u="a", st=500, bp="1000"), line(u="b", st=500, bp="1000")])
        self.assertEqual(later.rates[1000][UNITS], (2, 0))
        self.assertNotIn("new_units", later.rates[1000])
        self.assertEqual(later.rates[1000]["errors"], (1, 0))

    def test_requests_without_a_session_are_units_of_their_own_as_haproxy_really_logs_them(self) -> None:
        # written by HAProxy 2.6.12: what is not set is "-", and not empty
        real = (
            b'{"t":1796011708269,"be":"production","st":200,"ts":"--","Tr":13,"Ta":13,"B":239,"rc":"0","u":"-",'
            b'"bp":"5000","in":"-"}',
            b'{"t":1796011708302,"be":"canary","st":500,"ts":"--","Tr":13,"Ta":13,"B":239,"rc":"0","u":"-",'
            b'"bp":"5000","in":"1"}',
        )
        collector = Collector(since_ms=0)
        found = collector.count([*real * 3, real[1].replace(b'"bp":"5000"', b'"bp":"-"')]).rates
        self.assertEqual((found[5000][UNITS], found[5000]["errors"]), ((3, 3), (3, 0)))
        self.assertEqual(found[0]["errors"], (1, 0))
        self.assertEqual((collector.fallen_back, collector.garbage), (0, 0))

    def test_memory_is_bounded_by_forgetting_the_oldest_sessions(self) -> None:
        collector = Collector()
        with unittest.mock.patch("utils.rollout.edge.request_log.REMEMBERED", 10):
            rates(*[line(u=f"s{i}") for i in range(25)], collector=collector)
            again = rates(line(u="s24"), line(u="s0"), collector=collector)
        self.assertEqual(again[UNITS], (1, 0))

    def test_slow_is_slower_than_production_was_and_not_only_longer(self) -> None:
        collector = Collector(tolerance=0.25)
        collector.count([line(be="production", Ta=100 + i % 10, B=1000) for i in range(300)])
        slow = rates(line(Ta=300, B=1000), line(Ta=300, B=5000), line(Ta=100, B=100), collector=collector)
        self.assertEqual(slow["slow"], (1, 0))

    def test_lost_and_unreadable_lines_are_noticed(self) -> None:
        collector = Collector()
        collector.count([line(be="production")] * 994)
        self.assertEqual(collector.missing({"production": 1000}), "")
        self.assertIn("21 of 1015", collector.missing({"production": 1015}))
        collector.count([b"{", b"nonsense", line(st="x")] * 10)
        self.assertIn("cannot be read", collector.missing({"production": 994}))

    def test_a_request_that_ended_before_we_listened_is_not_ours(self) -> None:
        self.assertEqual(rates(line(t=1_000)), {})


@unittest.skipUnless(has_haproxy(), "haproxy is not there: apt-get install haproxy")
class RealBalancer(RolloutTest):
    def setUp(self) -> None:
        super().setUp()
        self.balancer = Balancer(self.root / "b", find_binary(""))
        from utils.rollout.edge.servers import free_port

        self.port = free_port()
        self.layout = Layout(Server(self.production.address, OLD), Server(self.candidate.address, NEW), self.port)
        self.balancer.write(self.layout)
        self.balancer.start()
        self.addCleanup(self.balancer.stop)

    def digests(self, sessions: int, per_second: float = 400) -> dict[str, str]:
        load = Load(f"127.0.0.1:{self.port}", per_second, questions=QUESTIONS, session_requests=1, seed=1)
        with load:
            while len(load.results) < sessions:
                time.sleep(0.01)
        self.assertEqual(load.failures(), [])
        return {result.session: result.digest for result in load.results[:sessions]}

    def test_what_it_says_of_a_server_that_comes_and_goes_is_no_request(self) -> None:
        sink = LogSink(self.balancer.home / "log.sock")
        self.addCleanup(sink.close)
        said: list[bytes] = []

        def heard(word: bytes) -> bool:
            said.extend(sink.drain())
            return any(word in one for one in said)

        self.production.stop()
        until(lambda: heard(b" is DOWN"), "the balancer says nothing of a dead server", seconds=30)
        self.production.start()
        until(lambda: heard(b" is UP"), "the balancer says nothing of a server that is back", seconds=30)
        collector = Collector(since_ms=0)
        collector.count(said)
        self.assertEqual(collector.garbage, 0, said)

    def test_shares_are_sticky_and_each_step_contains_the_one_before(self) -> None:
        lease = int(time.time()) + 60
        canary: set[str] = set()
        for share, expected in ((100, 0.01), (1000, 0.1), (5000, 0.5), (10_000, 1.0)):
            self.balancer.set(lease_until=lease, canary_bp=share)
            found = self.digests(600)
            now = {session for session, digest in found.items() if digest == NEW}
            self.assertLessEqual(canary & found.keys(), now)
            deviation = 4 * (600 * expected * (1 - expected)) ** 0.5
            self.assertAlmostEqual(len(now), 600 * expected, delta=deviation + 1e-9)
            canary = now

    def test_the_lease_ends_the_canary_by_itself_and_a_reload_forgets_the_share(self) -> None:
        self.balancer.set(lease_until=int(time.time()) + 2, canary_bp=10_000)
        self.assertEqual(set(self.digests(20).values()), {NEW})
        time.sleep(2.1)
        self.assertEqual(set(self.digests(50).values()), {OLD})
        self.balancer.set(lease_until=int(time.time()) + 60)
        self.assertEqual(set(self.digests(20).values()), {NEW})
        self.balancer.reload()
        self.assertEqual(self.balancer.settings(), {"canary_bp": 0, "lease_until": 0})
        self.assertEqual(set(self.digests(50).values()), {OLD})

    def test_every_request_is_a_line_and_every_line_a_counter(self) -> None:
        sink = LogSink(self.balancer.home / "log.sock")
        self.addCleanup(sink.close)
        time.sleep(1.2)  # the ring connects again once a second
        self.balancer.set(lease_until=int(time.time()) + 60, canary_bp=5000)
        collector = Collector(since_ms=0)
        self.digests(800, per_second=800)
        time.sleep(0.3)
        counts = collector.count(sink.drain())
        self.assertEqual(collector.lines, completed(self.balancer.statistics()))
        self.assertGreaterEqual(sum(counts.rates[5000][UNITS]), 800)

    def test_a_write_that_did_not_arrive_is_an_error(self) -> None:
        with self.assertRaises(BalancerError):
            self.balancer.set(canary_bb=5)
        taken = Balancer(self.root / "second", find_binary(""))
        with self.assertRaisesRegex(BalancerError, f"another program listens on .* {self.port}"):
            taken.take(self.layout)
        with self.assertRaisesRegex(BalancerError, "(?s)refuses its configuration.*ALERT"):
            self.balancer.write(Layout(Server("not an address", OLD), None, self.port))
        self.assertIn("server s 127.0.0.1", self.balancer.config.read_text())

    def test_a_folder_with_spaces_and_a_path_longer_than_a_socket_may_have(self) -> None:
        home = self.root / "models of mine" / ("x" * 120) / "rollout"
        balancer = Balancer(home, find_binary(""))
        layout = dataclasses.replace(self.layout, port=servers.free_port())
        self.assertEqual(balancer.take(layout), "started")
        self.addCleanup(balancer.stop)
        sink = LogSink(home / "log.sock")
        self.addCleanup(sink.close)
        time.sleep(1.2)
        status, _ = servers.get(f"127.0.0.1:{layout.port}", "/v1/models")
        found = servers.ask(
            f"127.0.0.1:{layout.port}", [{"role": "user", "content": "What is 7?"}], max_tokens=8, timeout_s=5
        )
        self.assertEqual((status, found.text, found.digest), (200, "The answer is 7.", OLD))
        balancer.reload()
        until(sink.drain, "its log does not reach us")

    @contextlib.contextmanager
    def streaming(self) -> Iterator[Load]:
        """Some twenty answers of production stream while the block runs, which ends with them."""
        load = Load(f"127.0.0.1:{self.port}", 40, questions=QUESTIONS, stream_share=1.0)
        with load:
            until(lambda: self.balancer.answers() > 5, "nothing streams")
            load.pause()
            yield load

    def test_slots_take_turns_without_a_reload_and_without_an_answer_cut(self) -> None:
        third = Stub("f" * 64)
        self.addCleanup(third.stop)
        pid = self.balancer.info()["Pid"]
        self.production.fault(per_token=1.5)
        with self.streaming() as slow:
            promoted = dataclasses.replace(self.layout, production=self.layout.canary, canary=None, slot=1)
            self.assertEqual(self.balancer.take(promoted), "told")
            self.assertEqual(set(self.digests(10).values()), {NEW})
            again = dataclasses.replace(promoted, canary=Server(third.address, third.digest))
            self.assertEqual(self.balancer.take(again), "told")
            self.assertEqual(self.balancer.roles(), (1, 0))
            self.balancer.set(canary_bp=10_000, lease_until=int(time.time()) + 60)
            self.assertEqual(set(self.digests(10).values()), {third.digest})
            self.assertGreater(len(self.balancer.open_answers(self.production.address)), 5)
            self.assertEqual(self.balancer.drain(third.address, 0), 0, "another model's answers are not cut")
        self.assertEqual((slow.failures(), {r.digest for r in slow.results}), ([], {OLD}))
        self.assertEqual(self.balancer.info()["Pid"], pid)
        self.balancer.stop()
        self.balancer.start()  # what is on disk serves the same
        self.assertEqual((self.balancer.roles(), set(self.digests(10).values())), ((1, 0), {NEW}))

    def test_other_settings_reload_and_what_the_hard_stop_cuts_is_counted(self) -> None:
        self.production.fault(per_token=1.5)
        for seconds, all_end in ((60.0, True), (2.0, False)):
            with self.subTest(reload_drain_s=seconds):
                layout = dataclasses.replace(self.layout, reload_drain_s=seconds)
                self.balancer.take(layout)
                with self.streaming() as load:
                    changed = dataclasses.replace(layout, session_header="x-other")
                    self.assertEqual(self.balancer.take(changed), "reloaded")
                    watch = DrainWatch(self.balancer, seconds)
                    watch.look()
                    self.assertGreater(watch.open, 5)
                    until(lambda watch=watch: watch.look() or not watch.open, "they do not end", seconds=30)
                self.assertEqual(watch.cut, len(load.failures()), load.failures()[:2])
                self.assertEqual(watch.cut == 0, all_end)

    def test_models_are_listed_for_clients_that_ask_first(self) -> None:
        self.balancer.take(dataclasses.replace(self.layout, models=("mine", "org/other")))
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)
        self.assertEqual([model.id for model in client.models.list()], ["mine", "org/other"])
        self.assertEqual(client.models.retrieve("org/other").id, "org/other")
        self.assertEqual(servers.model_names(self.production.address), ("model",))
        most = tuple(f"{number}{'/x' * 99}" for number in range(10, 10 + servers.MOST_NAMES))
        self.balancer.take(dataclasses.replace(self.layout, models=most))
        status, body = servers.get(f"127.0.0.1:{self.port}", "/v1/models")
        self.assertEqual((status, [entry["id"] for entry in json.loads(body)["data"]]), (200, list(most)))
        with self.assertRaisesRegex(BalancerError, "cannot be told"):
            haproxy_configuration.configuration(dataclasses.replace(self.layout, models=("a' if TRUE",)))


class Answers(unittest.TestCase):
    def test_exact_match_and_f1_are_those_of_squad(self) -> None:
        self.assertEqual(answer_metrics.exact_match("The Eiffel Tower.", ["eiffel tower"]), 1.0)
        self.assertEqual(answer_metrics.token_f1("a b c", ["c d"]), 2 * 1 / (2 + 2))  # "a" is an article
        self.assertEqual(answer_metrics.token_f1("x", ["y", "x"]), 1.0)
        self.assertEqual((answer_metrics.token_f1("", ["x"]), answer_metrics.token_f1("", [""])), (0.0, 1.0))

    def test_faults_are_named(self) -> None:
        cases = {
            ("  ", "stop"): "empty",
            ("one two three four five six", "length"): "runaway",
            ("no no no no " * 8, "stop"): "repetitive",
            ("I'm sorry, but I cannot help.", "stop"): "refusal",
            ("It returns the number of lines in the file.", "stop"): "",
        }
        for (text, finish), fault in cases.items():
            self.assertEqual(answer_metrics.fault(text, finish), fault, text)

    def test_pairs_are_lost_won_and_equal(self) -> None:
        prompt = golden.Prompt("p", ({"role": "user", "content": "q"},), ("four lines",))
        good = ServerAnswer("four lines", "stop", first_token_s=0.1, per_token_s=0.01)
        slow = ServerAnswer("four lines", "stop", first_token_s=0.3, per_token_s=0.03)
        found = golden.compare(prompt, slow, good, 0.25)
        self.assertEqual(found, {"probe_errors": 0, "output": 0, "quality": 0, "first_token": 1, "per_token": 1})
        self.assertEqual(golden.compare(prompt, good, slow, 0.25)["per_token"], -1)
        self.assertEqual(golden.compare(prompt, ServerAnswer(error="cut"), good, 0.25), {"probe_errors": 1})
        self.assertEqual(golden.compare(prompt, ServerAnswer("lines", "stop"), good, 0.25)["quality"], 1)

    def test_a_golden_file_names_its_bad_lines(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "g.jsonl"
            path.write_text('{"question": "q", "answers": ["a"]}\n\n{"question": "q"}\nnonsense\n')
            with self.assertRaisesRegex(DataError, r"g\.jsonl:3.*\n.*\n.*g\.jsonl:4"):
                golden.read(path, "system")
            # it could neither be shown nor written down while the rollout runs
            path.write_text('{"question": "q \\ud800", "answers": ["a"]}\n{"question": "q", "answers": ["\\udc00"]}\n')
            with self.assertRaisesRegex(DataError, r"g\.jsonl:1.*\n.*\n.*g\.jsonl:2"):
                golden.read(path, "system")
            path.write_text('{"id": "i", "question": "q", "context": "c", "answers": ["a", "b"]}\n')
            (prompt,) = golden.read(path, "system")
            self.assertEqual((prompt.name, prompt.golds, len(prompt.messages)), ("i", ("a", "b"), 2))


class Journals(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="ro-")
        self.addCleanup(directory.cleanup)
        self.path = Path(directory.name) / "journal.jsonl"
        writer = Journal(self.path)
        sides = {"address": "127.0.0.1:1", "digest": "d" * 64}
        header = {"id": "r", "started_at": 100.0, "policy": Policy(min_step_s=0).to_json(), "production": sides}
        writer.append("header", header | {"candidate": sides})
        good = {"quality": (0, 0, 60), "output": (1, 0, 59)}
        writer.append("seen", Observation(101.0, Counts({100: {UNITS: (900, 89_100)}}, good)).to_json())
        bad = Counts({1000: {UNITS: (50, 450), "errors": (25, 2)}})
        writer.append("seen", Observation(102.0, bad).to_json())

    def test_a_line_cut_by_a_crash_is_left_out_and_one_in_the_middle_is_an_error(self) -> None:
        state = journal.read(self.path).state
        self.assertEqual((state.phase, state.step), ("rolled_back", 1))
        with self.path.open("ab") as handle:
            handle.write(b'{"seen": {"at": 103')
        self.assertEqual(journal.read(self.path).state, state)
        Journal(self.path).event("published", 1.0)
        self.assertTrue(journal.read(self.path).happened("published"))
        self.path.write_bytes(self.path.read_bytes().replace(b'"at":101.0', b'"at":'))
        with self.assertRaisesRegex(ArtefactError, "jsonl:2"):
            journal.read(self.path)

    def test_a_snapshot_is_where_reading_goes_on_and_equals_the_replay(self) -> None:
        plain = journal.read(self.path)
        lines = self.path.read_bytes().splitlines(keepends=True)
        middle = replay(plain.began, plain.observations[:1], plain.policy)
        snapshot = (json.dumps({"state": middle.to_json()}) + "\n").encode()
        self.path.write_bytes(b"".join([*lines[:2], snapshot, *lines[2:]]))
        story = journal.read(self.path)
        self.assertEqual(story.snapshot, (1, json.loads(snapshot)["state"]))
        self.assertEqual((story.state, story.replayed), (plain.state, plain.state))

    def test_the_report_is_one_file_with_outcome_reason_and_escaped_answers(self) -> None:
        example = vars(golden.Example("<b>q</b>", ("g",), "<script>", "fine", "quality"))
        text = rollout_report.write(self.path, [example]).read_text()
        self.assertIn("Rolled back", text)
        self.assertIn("worse on errors (25 of 950 sessions, production 2 of 89550", text)
        self.assertIn("&lt;script&gt;", text)
        for outside in ("http://", "https://", "<script", "src=", "@import"):
            self.assertNotIn(outside, text)

    def test_the_screen_says_first_what_matters(self) -> None:
        story = journal.read(self.path)
        picture = {
            "at": 102.0,
            "now": 130.0,
            "reason": "why",
            "blind": "",
            "state": story.began.to_json(),
            "policy": story.policy.to_json(),
            "verdict": None,
            "live_share_bp": 0,
            "lease_s": 0.0,
            "examples": [],
        }
        shown = screen.screen(picture)
        self.assertTrue(shown.startswith("RUNNING, step 1 of 3   0% to the candidate\n  why"), shown[:80])
        self.assertIn("THE CONTROLLER HAS NOT LOOKED FOR 28 s", shown)
        over = screen.screen(picture | {"state": story.state.to_json(), "now": 103.0})
        self.assertTrue(over.startswith("ROLLED BACK"))


class CommandLine(unittest.TestCase):
    def judge(self, given: Any, *flags: str) -> tuple[int, dict[str, Any], str]:
        command = [sys.executable, str(ROOT / "scripts" / "rollout.py"), "judge", *flags]
        text = given if isinstance(given, str) else json.dumps(given)
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr

    def test_judge_answers_counts_with_a_verdict(self) -> None:
        def asked(errors: int, units: int) -> dict[str, Any]:
            return {"counts": {"rates": {"100": {"units": [units, 99 * units], "errors": [errors, 0]}}}, "step": 0}

        for errors, units, action in ((5, 100, "rollback"), (0, 100, "hold"), (0, 600, "advance")):
            self.assertEqual(self.judge(asked(errors, units), "--rollout.golden", "none")[1]["action"], action)
        self.assertEqual(self.judge(asked(0, 600))[1]["action"], "hold", "golden prompts were not given up")

    def test_judge_refuses_what_is_no_counts(self) -> None:
        for given in (
            *("", "[]", '{"counts": {"rates": {"100": {"units": [1, NaN]}}}}', "[" * 100_000),
            *({"counts": {}, "step": 9}, {"counts": {}, "step": [0]}, {"counts": {"rates": [1]}}),
            *({"counts": {"rates": {"100": 5}}}, {"counts": {"rates": {"\u00b2": {"units": [1, 2]}}}}),
            *({"counts": {}, "here": 3}, {"counts": {}, "policy": 5}, {"counts": {}, "policy": {"alpha": "x"}}),
        ):
            code, _, err = self.judge(given)
            self.assertEqual(code, 2, err)
            self.assertNotIn("Traceback", err)

    def test_status_without_a_rollout_says_so(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, str(ROOT / "scripts" / "rollout.py"), "status", "--run.models_dir", directory]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("no rollout was started", done.stdout)
            self.assertEqual(list(Path(directory).iterdir()), [])


def prometheus(errors: int) -> type[http.server.BaseHTTPRequestHandler]:
    """Counters that are 0 at the first four questions and have grown at later ones."""
    asked = []

    class Prometheus(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            grown = int(len(asked) > 4)
            value = {"c": 600, "p": 59_400, "e": errors, "f": 0}[self.path[-1]] * grown
            body = json.dumps({"data": {"result": [{"value": [0, str(value)]}]}}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Prometheus


class Settings(unittest.TestCase):
    def test_what_does_not_fit_together_is_reported_together(self) -> None:
        bad = {
            "--rollout.steps": ("0.5,0.1", "each above the one before"),
            "--rollout.ratios": ("2", "1 numbers for"),
            "--rollout.lease_seconds": ("2", "at least twice"),
            "--rollout.tick_seconds": ("1.5", "at least twice"),
            "--rollout.service": ("a b", "up to 40 letters"),
            "--rollout.candidate_digest": ("abc", "belongs to an address"),
        }
        with self.assertRaises(ConfigError) as caught:
            cli.resolve([piece for flag, (value, _) in bad.items() for piece in (flag, value)], {})
        for _, message in bad.values():
            self.assertIn(message, str(caught.exception))
        with self.assertRaisesRegex(ConfigError, "hundredths of a percent"):
            cli.resolve(["--rollout.steps", "0.00005,0.1,0.5"], {})

    def test_the_policy_spends_exactly_the_budget_that_was_set(self) -> None:
        section = RolloutSection(alpha=0.05, steps=(0.0001, 0.5), ratios=(4, 2), margins=(0.2, 0.1))
        policy = policy_of(section, has_prompts=True)
        self.assertAlmostEqual(sum(metric.alpha for metric in policy.metrics), 0.05)
        self.assertEqual([step.share_bp for step in policy.steps], [1, 5000])


class Kubernetes(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="ro-")
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name) / "k8s"
        self.files = kubernetes.write(RolloutSection(service="mine"), self.directory)

    def test_weights_of_every_route_are_the_steps(self) -> None:
        for name, share in (("0", 0), ("1", 100), ("10", 1000), ("50", 5000), ("100", 10_000)):
            (route,) = yaml.safe_load_all((self.directory / f"httproute-{name}.yaml").read_text())
            references = route["spec"]["rules"][0]["backendRefs"]
            self.assertEqual([r["weight"] for r in references], [10_000 - share, share])
            self.assertEqual([r["name"] for r in route["spec"]["rules"][1]["backendRefs"]], ["mine-production"])
            self.assertEqual(references[1]["name"], "mine-candidate")

    def test_argo_waits_for_the_gate_after_every_weight(self) -> None:
        rollout, template = yaml.safe_load_all((self.directory / "argo-rollout.yaml").read_text())
        steps = rollout["spec"]["strategy"]["canary"]["steps"]
        self.assertEqual([next(iter(step)) for step in steps], ["setWeight", "analysis"] * 3)
        self.assertEqual([step["setWeight"] for step in steps[::2]], [100, 1000, 5000])
        names = {step["analysis"]["templates"][0]["templateName"] for step in steps[1::2]}
        self.assertEqual(names, {template["metadata"]["name"]})

    def test_the_gate_asks_prometheus_and_ends_with_a_verdict(self) -> None:
        for errors, code in ((30, 5), (0, 0)):
            server = http.server.HTTPServer(("127.0.0.1", 0), prometheus(errors))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            queries = {"UNITS_CANARY": "c", "UNITS_PRODUCTION": "p", "ERRORS_CANARY": "e", "ERRORS_PRODUCTION": "f"}
            settings = {"PROMETHEUS": f"http://127.0.0.1:{server.server_port}", "STEP": "0", "SHARE_BP": "100"}
            script = {"ROLLOUT_SCRIPT": str(ROOT / "scripts" / "rollout.py"), "EVERY": "0.1"}
            done = subprocess.run(
                [sys.executable, self.directory / "gate.py"],
                env={**os.environ, **queries, **settings, **script},
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            server.shutdown()
            server.server_close()
            self.assertEqual(done.returncode, code, done.stdout + done.stderr)

    def test_nothing_is_overwritten(self) -> None:
        with self.assertRaisesRegex(ArtefactError, "not empty"):
            kubernetes.write(RolloutSection(), self.directory)


if __name__ == "__main__":
    unittest.main()
