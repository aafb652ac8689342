"""Write a model as a GGUF file, the format of llama.cpp, by the rules of llama.cpp's converter.

`formats` names what can be written. `architectures` has the rules for tensors, `hyperparameters`
those for the configuration, `vocabulary` and `pretokenizers` those for the tokenizer. `gguf` plans
the file and writes it.
"""
