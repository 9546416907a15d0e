"""The ops: schemas, autograd, dispatch, and one folder or file per implementation."""
