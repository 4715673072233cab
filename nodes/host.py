"""The host's sampling function of the moment, asked for the conditional prediction and told the unconditional one.

Node packs replace `comfy.samplers.sampling_function`, wrap `calc_cond_batch`, or set a function of their own in its
place. Going past one of them gives another prediction, or crashes where it prepares what others rely on.
"""

import comfy.samplers
from comfy.patcher_extension import WrappersMP

KEY = "guidance_interval"
BATCH = "sampler_calc_cond_batch_function"
CFG = "sampler_cfg_function"
PRE_CFG = "sampler_pre_cfg_function"
POST_CFG = "sampler_post_cfg_function"


def sampling_function(model, x, sigma, cond, cfg, model_options, seed, uncond=None, without_cfg=False):
    """The host's result at weight `cfg`, from an evaluation of `cond` alone; None where that cannot be had.

    model: the host's BaseModel; x: [B, ...]; sigma: [B]; cond: its processed conds. uncond, shaped like x, is
    taken for the unconditional prediction; None takes the conditional one, so that every weight gives the same.
    None is returned when the function in force looks for it at neither of the two places where it is told, and when it
    leaves `cond` out for a CFG function to evaluate (AutomaticCFG): what that does with either is its own. without_cfg:
    `model_options` has no such function, so that `cond` is evaluated where it would.
    """
    told, left_out = [], []

    def after_batch(executor, model, conds, x, *args):
        if len(conds) != 2 or conds[1] is not None:  # Not those of the sampling function, which has no uncond.
            return executor(model, conds, x, *args)
        if conds[0] is None:
            if not without_cfg:
                left_out.append(True)
                return executor(model, conds, x, *args)
            conds = [cond, None]
        out = executor(model, conds, x, *args)
        value = out[0] if uncond is None else uncond
        if value.shape != out[1].shape:  # In a window of the whole.
            return out
        told.append(True)
        return [out[0], value]

    def before_cfg(args):
        told.append(True)
        return [args["conds_out"][0], args["conds_out"][0] if uncond is None else uncond]

    transformer_options = model_options.get("transformer_options", {})
    wrappers = transformer_options.get("wrappers", {})
    batch = {KEY: [after_batch], **wrappers.get(WrappersMP.CALC_COND_BATCH, {})}  # First, so around those of packs.
    options = {
        **model_options,
        "transformer_options": {
            **transformer_options,
            "wrappers": {**wrappers, WrappersMP.CALC_COND_BATCH: batch},
        },
        PRE_CFG: [before_cfg, *model_options.get(PRE_CFG, ())],
    }
    result = comfy.samplers.sampling_function(model, x, sigma, None, cond, cfg, model_options=options, seed=seed)
    return result if told and not left_out else None


def reads_uncond_pass(fn):
    """Whether a post-CFG function needs a pass that is not made here, and would use a stale one or crash."""
    return getattr(fn, "__module__", "").endswith("nodes_sag")  # SAG takes its attention map from the uncond rows.


def conditional_only(model, x, sigma, cond, model_options, seed, post_cfg=()):
    """The conditional prediction, through `sampling_function`; None where that cannot be had.

    Of the functions around CFG only `post_cfg` are called, with the conditional prediction as the unconditional.
    """
    result = []

    def start(args):
        return args["cond_denoised"]  # Whatever weight a pack has set in place of ours.

    def end(args):
        result.append(args["denoised"])  # What a pack adds after this is guidance of its own.
        return args["denoised"]

    options = {k: v for k, v in model_options.items() if k not in (CFG, PRE_CFG)} | {POST_CFG: [start, *post_cfg, end]}
    told = sampling_function(model, x, sigma, cond, 1.0, options, seed, without_cfg=True)
    return None if told is None or not result else result[-1]
