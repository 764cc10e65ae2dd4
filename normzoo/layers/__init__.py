"""The layers, one family a file: the function, whose eager body is the reference, and its module."""
