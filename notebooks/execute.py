"""Run notebooks and keep what they show: .venv/bin/python notebooks/execute.py notebooks/*.ipynb

Kernels start in a notebook's folder, as Jupyter's do. Neither times nor versions are kept, so that
a second run of the same numbers leaves the same file.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path, **parameters) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run; parameters: values in the place of those in its cell
    of that tag. Raises nbclient.exceptions.CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    where, quiet = {"metadata": {"path": str(path.parent)}}, ["--log-level=ERROR"]
    NotebookClient(
        notebook, resources=where, record_timing=False, coalesce_streams=True, extra_arguments=quiet
    ).execute()
    name = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": name, "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        nbformat.write(execute(path), path)
