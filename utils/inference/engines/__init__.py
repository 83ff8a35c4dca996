"""Answers from a server of the OpenAI HTTP API: vLLM started here, or one that runs already.

engine         start or attach, wait until it is ready, load(adapter), ask(ids), stop
endpoint       the API: requests with retries, and what each failure means
vllm_command   how vLLM is started for a base model, its adapters and the GPUs that are there
server_process the started server's process: begun, ended, and what a killed command left      server_guard   its parent
served_model   prompts in, answers out: what is on disk already (answer_journal) is not asked again
"""
