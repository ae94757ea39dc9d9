"""The tests: unit (torch-free), engine (on tensors), cli (as a user), contracts (methods x tasks)."""
