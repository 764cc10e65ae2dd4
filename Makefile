PYTHON ?= python3
PYTEST_ARGS ?=

# The checkout comes first on the path, so that the targets run this tree even in an environment
# that holds another normzoo or that cannot be written to.
define run
@py="$$($(PYTHON) bootstrap.py $(1))" \
&& export PYTHONPATH="$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/bench$${PYTHONPATH:+:$$PYTHONPATH}" \
&& $(2)
endef

.PHONY: help demo test lint docs clean
# Two targets at once would install into the same environment.
.NOTPARALLEL:

help:
	@echo "make demo    run the demonstration"
	@echo "make test    run the tests (PYTEST_ARGS='-k rms' narrows them)"
	@echo "make lint    check format, style and types"
	@echo "make docs    build the documentation into docs/_build/html"
	@echo "make clean   remove what the other targets made, .venv included"
	@echo
	@echo "Each target sets up what it needs: in the active environment if that has torch, else"
	@echo "in .venv. NORMZOO_TORCH says what to install where there is no torch, for example"
	@echo "NORMZOO_TORCH='torch --index-url URL'."

demo:
	$(call run,demo,"$$py" -m normzoo demo)

test:
	$(call run,test,"$$py" -m pytest -n 2 $(PYTEST_ARGS))

lint:
	$(call run,lint,"$$py" -m ruff format --check . && "$$py" -m ruff check . \
	&& "$$py" -m basedpyright --pythonpath "$$py")

docs:
	$(call run,docs,"$$py" -m sphinx -W --keep-going -b html docs docs/_build/html)

clean:
	rm -rf .venv build dist normzoo.egg-info docs/_build docs/gallery normzoo-demo.html .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
