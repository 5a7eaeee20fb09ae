"""The conformance zoo: real architectures, tiny and with random weights, streamed and compared byte for byte."""
