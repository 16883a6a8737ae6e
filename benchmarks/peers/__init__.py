"""The block model in other engines: llama.cpp, ik_llama.cpp, and zentorch's linear operators."""
