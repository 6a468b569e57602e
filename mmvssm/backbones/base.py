"""What the backbones of all families have in common."""

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit


class Backbone(BaseModule):
    """An mmengine module that loads published checkpoints as they are."""

    def init_weights(self) -> None:
        """Apply ``init_cfg``.

        ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` goes through
        :func:`mmvssm.load_checkpoint`: the file is recognised and converted,
        what matched is logged, and a file that does not fit is an error
        (mmengine's own loader would go on without the weights). Without an
        ``init_cfg`` the published initialisation stays, which is in place
        after construction.
        """
        # Checkpoints are a layer above backbones.
        from mmvssm.checkpoints import load_checkpoint

        given = self.init_cfg
        cfgs = [given] if isinstance(given, dict) else list(given or [])
        pretrained = [
            cfg for cfg in cfgs if cfg['type'] in ('Pretrained', PretrainedInit)
        ]
        self.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained]
        super().init_weights()
        self.init_cfg = given
        for cfg in pretrained:
            report = load_checkpoint(self, cfg['checkpoint'], prefix=cfg.get('prefix'))
            print_log(str(report), logger='current')
