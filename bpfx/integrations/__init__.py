"""What a few libraries need to train a converted step; each module needs its library, and `import bpfx` needs none.

- :mod:`bpfx.integrations.huggingface`: ``Trainer`` and ``StepTrainerMixin`` for ``transformers.Trainer``
- :mod:`bpfx.integrations.accelerate`: ``plain_checkpoints`` for ``Accelerator.save_state``
- :mod:`bpfx.integrations.lightning`: ``PlainCheckpoints`` for a ``LightningModule``

PEFT and a loop of your own need nothing.
"""
