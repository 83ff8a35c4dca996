"""The canary rollout at the edge: the balancer, the servers, the clock, the disk. What is decided is in utils/rollout.

balancer/       HAProxy: what serves where, its process and memory, answers in replaced workers
traffic         the balancer's log lines as counts, one event per session and metric, reconciled with its counters
servers         the OpenAI HTTP API: one timed answer, which model it is; servers of merged directories
golden          prompts with expected answers, asked of both models, as pairs won and lost
journal         every observation on disk before it is acted on
rollout_loop    one tick: look, decide, write down, act, renew the lease
promotion       the candidate becomes production
abort           everyone to production, whatever is damaged
on_event        a person's own command when a rollout ended
service_state   a service's directory: its two models (address, digest, process), who is production
service         start, resume, promote, stop
screen          the picture in the terminal
rollout_report  one HTML file: what was seen, when it was decided and why
load            a bounded load, for the demo and the tests
demo            a bad and a good candidate of the embedded model on one machine
"""
