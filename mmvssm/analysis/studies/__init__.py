"""The articles' studies, as ``tools/analyze.py`` carries them out.

A study is one file here and one line in the table below. The file has a record,
``STUDY = Study(name=..., shows=..., run=run, ...)`` (:class:`.common.Study`), whose
``run`` takes a :class:`.common.Job` and returns a dict. In it,

- ``for model in job.models():`` builds the models one after another (as
  :class:`.subjects.StudyModel`: ``net``, ``backbone``, ``family``, ``task``,
  ``label``, and ``title``, which says whether the weights are random).
  ``job.build(subject, trained=False)`` builds one of ``job.subjects`` with random
  weights;
- ``job.images()`` are the images in ``job.size`` (:class:`.images.StudyImage`:
  ``pixels``, ``mask``, ``label``). ``job.images(size)`` has them in another size, and
  ``job.source.load(index, size)`` one at a time. ``model.prepare(image.pixels)`` is the
  normalised tensor (1, 3, H, W) on the model's device;
- ``job.options`` has the study's own arguments, which ``add_arguments`` declares;
- ``plotting.save(figure, job.picture('name'))`` writes ``STUDY_name.png``;
  :mod:`.plotting` has the look that all pictures share;
- ``for x in job.progress(items, 'what')`` shows a progress bar, and
  :func:`.common.print_table` prints what the reader wants to see first;
- what is returned becomes ``results`` of ``STUDY.json``. A number that is not finite
  is an error. :func:`.common.rounded` turns tensors into lists. Start with the label of
  each model: ``{model.label: {...}}``.

What is computed is in ``mmvssm/analysis/<topic>.py``: tensors in, tensors or numbers
out, without files or arguments, for scripts of one's own too.
"""

from mmvssm.analysis.studies import (
    attention,
    cam,
    erf,
    features,
    gates,
    norms,
    registers,
    scaling,
    tokens,
)

# In the order of docs/studies.md.
_MODULES = (
    erf,
    attention,
    norms,
    features,
    registers,
    tokens,
    gates,
    scaling,
    cam,
)
STUDIES = {module.STUDY.name: module.STUDY for module in _MODULES}
