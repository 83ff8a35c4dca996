"""The subjects of the pipeline, each a module; imports go down only.

plumbing   exceptions   what can go wrong, and the exit codes
           secrets      what a token or a password looks like, and a text without them
           disk         what a disk refuses, told by path and bytes; space asked for beforehand
           logger       a line for people and a JSON line for programs; silent above rank 0
           signals      SIGTERM and SIGINT: a clean end, after a checkpoint where there is one
           locks        one process at a time on a directory; what killed ones left is removed
           manifests    what a manifest has to hold, and its seal
           files        atomic writes, digests, the publish protocol
           runs         run directories, manifests, choosing parents
           progress     a bar on a terminal, plain lines elsewhere
           cli          flags and environment -> Config; exceptions -> message and exit code
pure       composition/ LoRA factors in, LoRA factors out: methods, checks, weight search, interference
           planning, known_models     sizes, memory, disk and time as arithmetic; MiniMax-M2 by heart
           fp8_choice   whether an FP8 checkpoint stays FP8 while an adapter is trained
           statistics   paired intervals over clusters and seeds
           verdict      four contrasts and the word that follows
           rollout/     the canary as values: gate, controller, simulation
           answers      exact match, token F1, faults of an answer
           overlap      text that stands in two places: shared n-grams, near duplicates
           corpus/invented   a domain of invented facts and its shuffled twin: the control with a known answer
engines    sizes, plan_report, plan_dry, preflight          a model counted; what fits where, in words; refusals
           model_directory   what is refused in one before any library opens it
           base_sources, base_model     fetched or built once; identified by digest, loaded frozen
           misloaded    what a library gets wrong without a word while it loads one
           sharding     one model dealt out to several processes; whether they still hold the same
           toy          real architectures at toy size
           corpus/      documents, labelled pairs, splits, the demo's domain
           prepared     prepared data on disk
           contamination   which test items stand in the corpus or in the training pairs
           chat         prompt and answer as token ids
           training_data, losses, watching, checkpoints, training     the loop over one adapter
           quantization a dense base in 4 or 8 bits, and the model directory of what these mean
           experts      fused experts: their spellings, and where a checkpoint's tensors sit in the model
           adapter_settings, adapter_files                  adapters on disk: what their settings say, their factors
           adapters, frozen_lora                            adapters on a model: to train, to infer
           verification                                     whether something on the disk can be trusted
           lineage, stages                                  how stages find their parents; what training scripts share
           composing, probing, interference, composing_pictures     several adapters as one, checked, chosen, explained
           evaluation, generation                           what a model knows; what it says
           comparison, proof/                               cells against each other: runs, controls, results, report
           lm_eval_task, lm_eval_functions                  the test split as tasks for lm-evaluation-harness
           shards, fp8, merging, layer_sample, selfcheck    a standalone model, streamed, and checked
           cards, model_index, gguf, hub                    its README, with an evaluation; other formats; publishing
           pages/       self-contained HTML pages: escaping, figures, charts
           canary/      the canary at the edge: balancer, log, probes, journal, loop, report
           benchmarks/  speed and memory as ratios of one run; the gpu suite
"""
