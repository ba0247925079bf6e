"""SGLang's offline engine with contexts:  python -m tests.serving.offline_engine <model>

An engine starts processes, which import the main module again: hence a file with a guard.
"""

import sys

from obcache_sglang.engine import Engine

if __name__ == "__main__":
    engine = Engine(model_path=sys.argv[1], dtype="float32", max_total_tokens=4096, obcache={"min_tokens": 32})
    document = "The quick brown fox jumps over the lazy dog. " * 20
    made = engine.compress(text=document)
    assert made["status"] == "compressed", made
    prompts = [document + "<|obcache|>" + question for question in ("So", "But", "And")]
    answers = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 4})
    assert [answer["meta_info"]["obcache"]["status"] for answer in answers] == ["reused"] * 3, answers
    assert [context["name"] for context in engine.contexts()] == [engine.context(made["id"])["name"]]
    assert engine.obcache_status()["counters"]["compressions"] == 1
    told = engine.generate([document + f"<|obcache:ratio={ratio}|>So" for ratio in (0.25, 0.75)], {"max_new_tokens": 4})
    assert [answer["meta_info"]["obcache"]["compression_ratio"] for answer in told] == [0.25, 0.75], told
    assert engine.delete_context(made["id"]) == "deleted"
    engine.shutdown()
    print("engine: all good")
