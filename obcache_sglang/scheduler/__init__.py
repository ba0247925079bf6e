"""The scheduler process: the way of a request that asks for compression.

hooks.py          where SGLang calls us (one table), and nothing else
wiring.py         what stands where in the process, and the order of the wrappers around attention
manager.py        CompressionManager: decides for every waiting request
jobs.py           the compressions under way: begin, go on, end
room.py           which compression waits for room, and what gives way
control_calls.py  answers to operators' and clients' questions about contexts
calibration.py    gates that the server makes of itself (calibration_run.py: one such calibration; rank_gates.py: a rank's part in it)
engine_view.py    what we read and change of SGLang's scheduler
requests.py       ContextReq (a question) and CompressionJob (the internal prefill that compresses), both SGLang requests
context_cache.py  the compressed contexts and their nodes in SGLang's radix tree
forward.py        inside the model's forward: positions, and the scoring after each attention layer
"""
