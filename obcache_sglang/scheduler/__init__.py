"""The scheduler process: the way of a request that asks for compression.

hooks.py      where SGLang calls us (one table), and nothing else
manager.py    CompressionManager: decides for every waiting request, starts and ends compressions, answers control calls
requests.py   ContextReq (a question) and CompressionJob (the internal prefill that compresses), both SGLang requests
contexts.py   Context and ContextCache: the compressed contexts and their nodes in SGLang's radix tree
forward.py    inside the model's forward: offset positions; score, select and copy in each attention layer
"""
