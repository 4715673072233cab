"""What of the A1111 extension needs a web UI, in a small imitation of one: its interfaces, its order of calls.

The real ones are in real/. Here the samplers are k-diffusion's, and the network is one line.
"""

import copy
import importlib.util
import inspect
import re
import sys
import threading
import types
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import guidance_interval
import pytest
import torch
from guidance_interval import GuidanceInterval

ROOT = Path(guidance_interval.__file__).parent
ON = (True, "custom", 0.28, 5.42, "Both passes")
OFF = (False, *ON[1:])
SIGMAS = torch.linspace(-3.5, 2.68, 1000).exp()  # 0.03 to 14.6

# ----------------------------------------------------------------------------
# The page: Gradio's components, as far as they are used.


class Component:
    """Keeps what it is made with. `fire` is a change of its value, `by_hand` one that the user makes."""

    def __init__(self, value=None, *args, elem_id=None, **kwargs):
        self.load = value if callable(value) else None  # A function is asked once now, and by each page that is opened.
        self.value = value() if callable(value) else value
        self.elem_id = elem_id
        self.label = kwargs.get("label")
        self.visible = kwargs.get("visible", True)
        self.listeners, self.listeners_by_hand = [], []

    def change(self, fn, inputs, outputs, show_progress=True):
        self.listeners.append((fn, _listed(inputs), outputs))

    blur = change

    def input(self, fn, inputs, outputs, show_progress=True):
        self.listeners_by_hand.append((fn, _listed(inputs), outputs))

    def by_hand(self, value):
        self.value = value
        self._tell(self.listeners_by_hand)
        self.fire()

    def fire(self):
        self._tell(self.listeners)

    def _tell(self, listeners):
        for fn, inputs, outputs in listeners:
            out = fn(*[i.value for i in inputs])
            outputs, out = (outputs, out) if isinstance(outputs, list) else ([outputs], [out])
            for component, value in zip(outputs, out, strict=True):
                component.take(value)

    def take(self, value):
        """A value, or an update of it, comes from an event; if it is another one, that is a change."""
        update = value if isinstance(value, dict) else {"value": value}
        self.visible = update.get("visible", self.visible)
        if update.get("value", self.value) != self.value:
            self.value = update["value"]
            self.fire()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


class Choice(Component):
    def __init__(self, choices, value=None, **kwargs):
        super().__init__(value, **kwargs)
        self.choices = choices


def _listed(inputs):
    return inputs if isinstance(inputs, list) else [] if inputs is None else [inputs]


# ----------------------------------------------------------------------------
# The samplers: the host's classes, over k-diffusion's functions.

SamplerData = namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])


class Denoiser(torch.nn.Module):
    """Automatic1111's CFGDenoiser.forward, without masks and refiner."""

    def __init__(self, sampler, host):
        super().__init__()
        self.sampler = sampler
        self.host = [host]
        self.p = None
        self.step = 0
        self.inner_model = Network() if sampler.model is None else sampler.model

    def combine_denoised(self, x_out, conds, uncond, cond_scale):
        out = x_out[-len(uncond) :].clone()
        for i, prompts in enumerate(conds):
            for row, weight in prompts:
                out[i] += (x_out[row] - x_out[-len(uncond) :][i]) * (weight * cond_scale)
        return out

    def forward(self, x, sigma, cond, uncond, cond_scale):
        (host,) = self.host
        weights = [[prompt.weight for prompt in prompts] for prompts in cond.batch]
        repeats = torch.tensor([len(w) for w in weights])
        x_in = torch.cat([x.repeat_interleave(repeats, 0), x])
        sigma_in = torch.cat([sigma.repeat_interleave(repeats, 0), sigma])
        text_cond = cond.rows.repeat(len(x), 1)
        text_uncond = uncond.expand(len(x), -1)
        params = types.SimpleNamespace(
            x=x_in, sigma=sigma_in, text_cond=text_cond, text_uncond=text_uncond, denoiser=self
        )
        for callback in host.callbacks["cfg_denoiser"]:
            callback(params)
        rows = torch.cat([params.text_cond, params.text_uncond])
        x_out = self.inner_model(params.x, params.sigma, cond={"c_crossattn": [rows]})
        numbered = iter(range(len(rows)))
        conds = [[(next(numbered), w) for w in image] for image in weights]
        self.step += 1
        return self.combine_denoised(x_out, conds, text_uncond, cond_scale)


class Network(torch.nn.Module):
    """A denoiser of rows, which counts them."""

    rows = 0

    def __init__(self):
        super().__init__()
        self.sigmas = SIGMAS

    def forward(self, x, sigma, cond):
        self.rows += len(x)
        shift = cond["c_crossattn"][0].mean(1)[:, None, None, None]
        return x / (1 + sigma[:, None, None, None] ** 2) + shift


class Sampler:
    """modules.sd_samplers_kdiffusion.KDiffusionSampler."""

    def __init__(self, func, model, host):
        self.func = func
        self.model = model.network if hasattr(model, "network") else None
        self.model_wrap_cfg = Denoiser(self, host)
        self.model_wrap = self.model_wrap_cfg.inner_model
        self.host = host

    def get_sigmas(self, p, steps):
        from k_diffusion import sampling

        scheduler = p.hr_scheduler if p.is_hr_pass else p.scheduler
        if scheduler == "Flux2":  # Forge Neo's: by the size of the image.
            size = (p.hr_upscale_to_x, p.hr_upscale_to_y) if p.is_hr_pass else (p.width, p.height)
            return torch.linspace(p.sd_model.top * size[0] * size[1] / 512**2, 0, steps + 1)
        function = sampling.get_sigmas_exponential if scheduler == "Exponential" else sampling.get_sigmas_karras
        return function(steps, SIGMAS[0].item(), (self.model_wrap.sigmas[-1] * self.host.model.alphas_cumprod).item())

    def initialize(self, p):
        self.model_wrap_cfg.p = p
        self.host.sampling.torch = types.SimpleNamespace(hijacked_for=p)
        kwargs = {"eta": self.host.shared.opts.eta, "s_churn": p.s_churn, "s_tmax": p.s_tmax}
        return {name: value for name, value in kwargs.items() if name in inspect.signature(self.func).parameters}

    def sample(self, p, cond, uncond):
        kwargs = self.initialize(p)
        state = self.host.shared.state
        state.sampling_step = 0
        x = torch.randn(p.batch_size, 4, 8, 8, generator=torch.Generator().manual_seed(p.seed)) * SIGMAS[-1]

        def callback(d):
            state.sampling_step = d["i"]

        self.sampler_extra_args = args = {"cond": cond, "uncond": uncond, "cond_scale": p.cfg_scale}
        sigmas = self.get_sigmas(p, p.steps)
        return self.func(self.model_wrap_cfg, x, sigmas, extra_args=args, callback=callback, disable=True, **kwargs)


# ----------------------------------------------------------------------------
# The host's modules.


class Processing:
    """modules.processing.StableDiffusionProcessing."""

    enable_hr = is_hr_pass = is_api = False
    scheduler = hr_scheduler = "Karras"
    width = height = 512
    batch_size = n_iter = 1
    cfg_scale = 7.0
    s_churn, s_tmax = 0.0, float("inf")
    prompt = "a photo of a cat"
    seed = 1
    steps = 8
    sampler_name = "Euler"
    outpath_grids = "grids"
    styles = ()

    def __init__(self, host, script_args, **kwargs):
        self.scripts = host.runner
        self.script_args = list(script_args)
        self.extra_generation_params = {}
        self.override_settings = {}
        self.comments = []
        vars(self).update(kwargs)

    def comment(self, text):
        self.comments.append(text)

    def calculate_target_resolution(self):
        enlarged = self.hr_resize_x or self.width * self.hr_scale, self.hr_resize_y or self.height * self.hr_scale
        self.hr_upscale_to_x, self.hr_upscale_to_y = map(int, enlarged)

    def init(self, *args):
        pass


class Runner:
    """modules.scripts.ScriptRunner."""

    def __init__(self, classes, host):
        self.host = host
        self.inputs = [Component(0)]
        self.alwayson_scripts, self.selectable_scripts = [], []
        for cls in classes:
            script = cls()
            always = script.show(False) is host.always_visible
            (self.alwayson_scripts if always else self.selectable_scripts).append(script)
            script.args_from = len(self.inputs)
            self.inputs += script.ui(False)
            script.args_to = len(self.inputs)

    def call(self, method, p, *args):
        for script in self.alwayson_scripts:
            try:
                getattr(script, method)(p, *args, *p.script_args[script.args_from : script.args_to])
            except Exception as e:
                self.host.reported.append(e)


class Host(types.SimpleNamespace):
    """One running web UI; `modules` are what the extension imports."""

    def __init__(self):
        from k_diffusion import sampling

        super().__init__(reported=[], saved=[], always_visible=object(), sampling=types.SimpleNamespace(torch=torch))
        self.callbacks = {"cfg_denoiser": [], "before_ui": [], "infotext_pasted": []}
        self.functions = {"Euler": sampling.sample_euler, "Heun": sampling.sample_heun}
        self.functions |= {"Euler a": sampling.sample_euler_ancestral, "DPM++ 2M": sampling.sample_dpmpp_2m}
        self.shared = types.SimpleNamespace(
            opts=types.SimpleNamespace(
                data={}, s_churn=0.0, s_tmin=0.0, s_tmax=0.0, s_noise=1.0, eta=1.0, grid_save=True, grid_format="png"
            ),
            state=types.SimpleNamespace(interrupted=False, skipped=False, sampling_step=0, job_count=0),
            prompt_styles=types.SimpleNamespace(
                apply_styles_to_prompt=lambda prompt, styles: " AND ".join([prompt, *styles])
            ),
        )
        self.model = types.SimpleNamespace(alphas_cumprod=torch.ones(()), is_sdxl=False, top=14.6)
        self.lock = threading.Lock()
        script = type("Script", (), {"show": lambda self, is_img2img: True})
        update = types.SimpleNamespace(update=lambda **changed: changed)
        self.modules = {
            "gradio": module(
                Dropdown=Choice,
                Radio=Choice,
                Number=Component,
                HTML=Component,
                Checkbox=Component,
                Row=Component,
                update=update.update,
            ),
            "fastapi": module(HTTPException=HTTPException),
            "modules": module(),
            "modules.shared": self.shared,
            "modules.devices": module(device="cpu"),
            "modules.call_queue": module(queue_lock=self.lock),
            "modules.prompt_parser": module(get_multicond_prompt_list=self.multicond),
            "modules.extra_networks": module(parse_prompts=parse_prompts),
            "modules.sd_models": module(
                model_data=types.SimpleNamespace(sd_model=self.model),
                apply_alpha_schedule_override=self.apply_alpha_schedule_override,
            ),
            "modules.sd_samplers": module(create_sampler=self.create_sampler),
            "modules.sd_samplers_common": module(sampling=self.sampling, setup_img2img_steps=setup_img2img_steps),
            "modules.script_callbacks": module(
                on_cfg_denoiser=self.callbacks["cfg_denoiser"].append,
                on_before_ui=self.callbacks["before_ui"].append,
                on_infotext_pasted=self.callbacks["infotext_pasted"].append,
            ),
            "modules.scripts": module(
                Script=script,
                AlwaysVisible=self.always_visible,
                scripts_data=[],
                scripts_txt2img=module(alwayson_scripts=[Comments()]),
            ),
            "modules.ui_components": module(InputAccordion=lambda value, **kwargs: Component(value, **kwargs)),
            "modules.infotext_utils": module(PasteField=lambda component, target: (component, target)),
            "modules.images": module(
                GridAnnotation=lambda text="": text,
                image_grid=lambda images, rows: Image([i.text for i in images], rows),
                draw_grid_annotations=self.annotate,
                save_image=lambda image, path, name, **kwargs: self.saved.append((image, kwargs)),
            ),
            "modules.processing": module(
                Processed=Processed,
                StableDiffusionProcessingTxt2Img=Processing,
                process_images=self.process_images,
                fix_seed=lambda p: None,
                rescale_zero_terminal_snr_sigmas=lambda sigmas: torch.cat([sigmas[:-1], torch.tensor([4518.0])]),
            ),
        }

    def apply_alpha_schedule_override(self, model):
        """modules.sd_models': the model's, by an option; 1 where it is off."""
        model.alphas_cumprod = torch.tensor(self.shared.opts.data.get("alphas", 1.0))

    def multicond(self, prompts):
        return [[(i, 1.0) for i, _ in enumerate(p.split("AND"))] for p in prompts], None, None

    def create_sampler(self, name, model):
        assert name in self.functions, f"bad sampler name: {name}"
        sampler = Sampler(self.functions[name], model, self)
        sampler.config = SamplerData(name, None, [], {})
        return sampler

    def annotate(self, grid, width, height, columns, rows):
        return Image([grid.text, columns], grid.width)

    def process_images(self, p):
        """modules.processing.process_images, in its order."""
        p.scripts.call("process", p)
        p.init([], [], [])
        images = []
        for _ in range(p.n_iter):
            self.shared.state.skipped = False
            if self.shared.state.interrupted:
                break
            prompts = p.prompt.split(" AND ")
            rows = torch.stack([torch.full((3,), float(len(prompt))) for prompt in prompts])
            batch = [[types.SimpleNamespace(weight=1.0) for _ in prompts]] * p.batch_size
            cond = types.SimpleNamespace(batch=batch, rows=rows)
            p.sampler = self.create_sampler(p.sampler_name, self.model)
            samples = p.sampler.sample(p, cond, torch.zeros(1, 3))
            p.scripts.call("post_sample", p, samples)
            images += [Image(sample, 8) for sample in samples]
            self.shared.state.sampling_step = 0
        processed = Processed(p, images, p.seed)
        processed.infotexts = [dict(p.extra_generation_params) for _ in images]
        p.scripts.call("postprocess", p, processed)
        return processed


class Processed:
    """modules.processing.Processed."""

    def __init__(self, p, images, seed=-1, info=""):
        self.images, self.seed, self.comments = images, seed, "".join(f"{c}\n" for c in p.comments)
        self.infotexts = []
        self.index_of_first_image = 0


class Image:
    def __init__(self, text, width):
        self.text, self.width, self.height = text, width, 8


class HTTPException(Exception):
    """starlette's: its text is empty."""

    def __init__(self, status_code, detail=None):
        self.status_code, self.detail = status_code, detail

    def __str__(self):
        return ""


def setup_img2img_steps(p, steps=None):
    if steps is not None:
        return int(steps / min(p.denoising_strength, 0.999)), steps - 1
    return p.steps, int(min(p.denoising_strength, 0.999) * p.steps)


def parse_prompts(prompts):
    """modules.extra_networks': without `<lora:...>`."""
    return [re.sub("<[^>]*>", "", prompt) for prompt in prompts], {}


class Comments:
    """modules.processing_scripts.comments: takes out the rest of a line after #."""

    def title(self):
        return "Comments"

    def process(self, p):
        p.all_prompts = [re.sub("#[^\n]*", "", prompt) for prompt in p.all_prompts]
        p.all_negative_prompts = [re.sub("#[^\n]*", "", prompt) for prompt in p.all_negative_prompts]


def module(**contents):
    return types.SimpleNamespace(**contents)


@pytest.fixture
def host(monkeypatch):
    """A web UI that has loaded the extension; what it imported is taken out again."""
    host = Host()
    for name, contents in host.modules.items():
        fake = types.ModuleType(name)
        vars(fake).update(vars(contents))
        monkeypatch.setitem(sys.modules, name, fake)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, fake)
    for name in list(sys.modules):  # Loaded anew by the script; the other tests keep theirs.
        if name.partition(".")[0] == "guidance_interval":
            monkeypatch.delitem(sys.modules, name)
    host.load = lambda: load_script(host)
    host.load()
    yield host
    for name in list(sys.modules):
        if name.partition(".")[0] == "guidance_interval":
            del sys.modules[name]  # Before monkeypatch puts back what there was.


def load_script(host):
    for callbacks in host.callbacks.values():
        callbacks.clear()  # As the host does before it loads its scripts.
    spec = importlib.util.spec_from_file_location("guidance_interval.py", ROOT / "scripts" / "guidance_interval.py")
    host.script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host.script)
    host.runner = Runner([host.script.Accordion, host.script.Dropdown], host)


def generate(host, accordion=OFF, script=None, **kwargs):
    """`(p, Processed)` as the Generate button makes it."""
    p = Processing(host, [0, *accordion, *(script or [*ON[1:], False])], **kwargs)
    if script is None:
        return p, host.process_images(p)
    dropdown = host.runner.selectable_scripts[0]
    return p, dropdown.run(p, *p.script_args[dropdown.args_from : dropdown.args_to])


def samples(processed):
    return torch.stack([image.text for image in processed.images])


# ----------------------------------------------------------------------------
# One generation.


def test_the_interval_acts_and_is_written(host):
    _, stock = generate(host)
    p, limited = generate(host, ON)
    assert not torch.equal(samples(stock), samples(limited))
    assert limited.infotexts == [{"Guidance interval": "0.28-5.42"}] and stock.infotexts == [{}]
    sigmas = p.sampler.get_sigmas(p, 8)[:-1]
    assert p.guidance_interval_rows == p.sampler.model_wrap.rows == 8 + sum(0.28 < s <= 5.42 for s in sigmas.tolist())
    assert not hasattr(p, "guidance_interval") and not host.reported
    assert torch.equal(samples(generate(host)[1]), samples(stock))
    assert torch.equal(samples(generate(host, script=[*ON[1:], False])[1]), samples(limited))


@pytest.mark.parametrize("how", ["skipped", "interrupted"])
def test_an_image_stopped_before_its_first_call_keeps_the_run_going(host, how, monkeypatch):
    sample, begun = Sampler.sample, []

    def stopped(sampler, p, *args):
        begun.append(p)
        if len(begun) > 1:
            return sample(sampler, p, *args)
        setattr(host.shared.state, how, True)
        host.shared.state.sampling_step = 0
        return torch.zeros(1, 4, 8, 8)

    _, fine = generate(host, ON, n_iter=2)
    monkeypatch.setattr(Sampler, "sample", stopped)
    p, processed = generate(host, ON, n_iter=2)
    assert not p.comments and all("Guidance interval" in text for text in processed.infotexts)
    if how == "skipped":
        assert torch.equal(samples(processed)[1], samples(fine)[1])


@pytest.mark.parametrize("said", ["announced no denoiser call", "Odd evaluates its model in a way"])
def test_an_unknown_web_ui_gets_one_message_and_no_parameters(host, said):
    if "Odd" in said:
        callback = host.callbacks["cfg_denoiser"].pop()

        def announce(params):
            odd = type("Odd", (), {"p": params.denoiser.p})()
            callback(types.SimpleNamespace(denoiser=odd))

        host.callbacks["cfg_denoiser"].append(announce)
    else:
        host.callbacks["cfg_denoiser"].clear()
    _, stock = generate(host)
    p, processed = generate(host, ON, n_iter=2)
    assert len(p.comments) == 1 and said in p.comments[0]
    assert torch.equal(samples(processed)[0], samples(stock)[0]) and processed.infotexts == [{}, {}]


def test_noise_levels_that_cannot_be_read_are_told(host, monkeypatch):
    _, stock = generate(host)
    monkeypatch.setattr(host.script.patch, "noise_levels_of", lambda inner: inner.of_another_web_ui)
    p, processed = generate(host, ON)
    assert len(p.comments) == 1 and "noise levels cannot be read: AttributeError" in p.comments[0]
    assert torch.equal(samples(processed), samples(stock)) and processed.infotexts == [{}]


@pytest.mark.parametrize(
    ("accordion", "said"),
    [
        ((True, "custom", 5, 1, "Both passes"), "swap them"),
        ((True, "custom", "1", 2, "Both passes"), "must be a number, got '1'"),
        (("false", *ON[1:]), "must be true or false, got 'false'"),
        ((True, "sd9", 1, 2, "Both passes"), "preset must be one of"),
    ],
)
def test_what_cannot_be_stops_the_host_before_it_samples(host, accordion, said):
    p = Processing(host, [0, *accordion, *ON[1:], False])
    with pytest.raises(ValueError, match=said) as e:
        host.process_images(p)
    assert e.value.status_code == 422 and e.value.detail == str(e.value)
    assert not hasattr(p, "sampler") and not host.reported
    p.script_args[1:6] = ON  # The same object, asked for something that can be.
    host.process_images(p)
    assert "init" not in vars(p) and p.guidance_interval_rows > 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_api_cannot_answer_with_nan_or_infinity(host, value):
    for name, accordion in (
        ("sigma_hi", (True, "custom", 0.28, value, "Both passes")),
        ("sigma_lo", (True, "sdxl", value, 1, "Both passes")),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a finite number.*got {value}"):
            generate(host, accordion, is_api=True)
    _, processed = generate(host, (True, "custom", 0.28, float("inf"), "Both passes"))
    assert processed.infotexts == [{"Guidance interval": "0.28-inf"}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (ON[1:], "takes 5 arguments, got 4"),
        ([*ON[1:], False, 1], "takes 5 arguments, got 6"),
        ([*ON[1:], "false"], "whether to compare, must be true or false, got 'false'"),
        (["custom", 5, 1, "Both passes", False], "swap them"),
    ],
)
def test_the_scripts_arguments_are_checked(host, arguments, said):
    with pytest.raises(ValueError, match=said) as e:
        generate(host, script=arguments)
    assert e.value.status_code == 422


def test_on_twice_is_refused(host):
    with pytest.raises(ValueError, match="on twice"):
        generate(host, ON, script=[*ON[1:], False])


def test_reload_takes_the_new_code(host):
    first = sys.modules["guidance_interval.a1111.patch"]
    host.load()
    second = sys.modules["guidance_interval.a1111.patch"]
    assert second is not first and host.script.patch is second
    assert host.callbacks["cfg_denoiser"] == [second.on_cfg_denoiser]
    assert len(host.callbacks["before_ui"]) == 1
    _, processed = generate(host, ON)
    assert processed.infotexts == [{"Guidance interval": "0.28-5.42"}]


def test_another_package_of_the_name_is_left_alone(host):
    other = types.ModuleType("guidance_interval")
    other.__file__ = "/elsewhere/guidance_interval/__init__.py"
    for name in [n for n in sys.modules if n.startswith("guidance_interval")]:
        del sys.modules[name]
    sys.modules["guidance_interval"] = other
    host.load()
    assert sys.modules["guidance_interval"] is other
    assert host.script.patch.__name__ == "guidance_interval_extension.a1111.patch"
    for name in [n for n in sys.modules if n.startswith("guidance_interval_extension")]:
        del sys.modules[name]


# ----------------------------------------------------------------------------
# X/Y/Z plot.

AxisOption = namedtuple("AxisOption", ["label", "type", "apply", "confirm", "choices"], defaults=[None, None])
AxisInfo = namedtuple("AxisInfo", ["axis", "values"])


@pytest.fixture
def plot(host):
    """`plot({axis: values}, accordion)`: what X/Y/Z plot does with our axes; the Processed of each cell, or None."""
    script = module(axis_options=[], AxisOption=AxisOption)
    plain = types.ModuleType("xyz_grid")
    vars(plain).update(vars(script))
    sys.modules["modules.scripts"].scripts_data.append(types.SimpleNamespace(module=plain))
    for _ in range(2):  # Once per load of the page.
        host.callbacks["before_ui"][0]()
    options = {o.label: o for o in plain.axis_options}
    assert len(options) == len(plain.axis_options) == 4

    def run(axes, accordion=OFF, state=True):
        p = Processing(host, [0, *accordion, *ON[1:], False])
        infos = [AxisInfo(options[f"[Guidance Interval] {name}"], values) for name, values in axes.items()]
        for info in infos:
            info.axis.confirm(p, info.values)
        infos += [AxisInfo(AxisOption("Nothing", str, lambda p, x, xs: None), [0])] * (3 - len(infos))
        for letter, info in zip("xyz" if state else "", infos, strict=False):
            setattr(host.shared.state, f"xyz_plot_{letter}", info)
        cells = []
        for x in infos[0].values:
            for y in infos[1].values:
                cell = copy.copy(p)
                for info, value in zip(infos, (x, y), strict=False):
                    info.axis.apply(cell, value, info.values)
                try:
                    cells.append(host.process_images(cell))
                except Exception:
                    cells.append(None)
        return cells

    return run


def test_axes_act_on_and_off(plot):
    texts = [cell.infotexts[0].get("Guidance interval") for cell in plot({"interval": ["1-2", "off", "0.28-inf"]})]
    assert texts == ["1-2", None, "0.28-inf"]
    texts = [c.infotexts[0]["Guidance interval"] for c in plot({"sigma_lo": [0.5, 1.0], "sigma_hi": [2.0, 0.0]}, ON)]
    assert texts == ["0.5-2", "0.5-inf", "1-2", "1-inf"]


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"sigma_lo": [0.28, 6.0]}, "sigma_lo 6.0"),
        ({"sigma_lo": [0.0, 3.0, 6.0], "sigma_hi": [2.0, 6.0]}, "sigma_lo 3.0 with sigma_hi 2.0"),
        ({"preset": ["sdxl", "sd9"]}, "unknown preset"),
    ],
)
def test_a_plot_with_an_impossible_cell_is_refused(host, plot, axes, said):
    with pytest.raises(ValueError, match=said) as e:
        plot(axes)
    assert e.value.status_code == 422


def test_another_script_over_the_axes_has_an_empty_cell_and_no_wrong_one(host, plot):
    with pytest.raises(ValueError):
        plot({"sigma_hi": [0.1]})  # An earlier plot, whose axes still stand in the host's state.
    cells = plot({"sigma_lo": [0.28, 6.0]}, state=False)
    assert cells[1] is None and cells[0].infotexts == [{"Guidance interval": "0.28-5.42"}]


# ----------------------------------------------------------------------------
# The comparison.


@pytest.mark.parametrize("prompt", ["a cat", "a cat AND a dog"])
def test_each_column_of_the_comparison_can_be_made_again(host, prompt):
    _, processed = generate(host, script=[*ON[1:], True], prompt=prompt, batch_size=2)
    (_, columns), cells = processed.images[0].text, processed.images[1:]
    assert [c[0] for c in columns] == ["CFG everywhere", "Interval (0.28, 5.42]", "Conditional only"]
    prompts = prompt.count("AND") + 1
    assert columns[2][1].endswith(f" s, {8 * 2 * prompts} network evaluations")
    assert columns[0][1].endswith(f" s, {8 * 2 * (prompts + 1)} network evaluations")
    paste = sys.modules["guidance_interval.a1111.settings"].paste
    for i, text in enumerate(processed.infotexts[1:]):
        found = paste(text)
        controls = (found.preset or "custom", found.sigma_lo or 0, found.sigma_hi or 0, found.passes or "Both passes")
        accordion = (found.enabled, *controls)
        _, again = generate(host, accordion, prompt=prompt, batch_size=2)
        assert torch.equal(again.images[i % 2].text, cells[i].text)
    ((_, saved),) = host.saved
    assert saved["info"] == {"Guidance interval": "0.28-5.42"}


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_comparison_shows_what_there_is(host, monkeypatch, at):
    """at: the rendering during which the user interrupts; the first warms up."""
    real, rendered = host.process_images, []

    def process_images(p):
        rendered.append(p)
        processed = real(p)
        host.shared.state.interrupted = len(rendered) == at
        return processed

    monkeypatch.setattr(host.script.compare, "process_images", process_images)
    _, processed = generate(host, script=[*ON[1:], True])
    assert len(rendered) == at
    assert len(processed.images) == (0 if at == 1 else at)  # A grid, and the columns.


def test_a_comparison_interrupted_within_a_column_shows_the_rows_that_are_whole(host, monkeypatch):
    sample, sampled = Sampler.sample, []

    def interrupted(sampler, p, *args):
        sampled.append(p)
        host.shared.state.interrupted = len(sampled) >= 4  # After the warm-up and a column: at the first of the second.
        return sample(sampler, p, *args)

    monkeypatch.setattr(Sampler, "sample", interrupted)
    _, processed = generate(host, script=[*ON[1:], True], n_iter=2)
    assert len(sampled) == 4 and len(processed.images) == len(processed.infotexts) == 3  # A grid, one row of two.


def test_a_comparison_whose_images_were_skipped_says_so(host, monkeypatch):
    monkeypatch.setattr(Sampler, "sample", lambda self, p, cond, uncond: torch.zeros(0, 4, 8, 8))
    p, processed = generate(host, script=[*ON[1:], True])
    assert "nothing to compare" in p.comments[0] and processed.images == []


# ----------------------------------------------------------------------------
# The page.

SCHEDULE = {"txt2img_sampling": "Euler", "txt2img_scheduler": "Karras", "txt2img_steps": 20}


@pytest.fixture
def page(host):
    """The controls of one picture, on a page whose host has these: `.html` is the picture, `.ours` our controls."""
    ui = host.script.ui
    components = {name: Component(value) for name, value in SCHEDULE.items()}
    components["txt2img_prompt"] = Component("a cat")
    for name, component in components.items():
        ui.remember(component, name)
    preset, lo, hi, passes = ui.controls("txt2img", "new")
    done, log = Component("{}"), Component()
    ui.remember(done, "generation_info_txt2img")
    ui.remember(log, "html_log_txt2img")
    html = preset.listeners[-1][2]
    return module(host=components, preset=preset, lo=lo, hi=hi, passes=passes, done=done, log=log, html=html)


def test_the_picture_follows_the_controls(page):
    html = page.html
    assert "9 of 20 steps are guided" in html.value and "29 network evaluations per image instead of 40" in html.value
    page.hi.by_hand(0)
    assert page.preset.value == "custom" and "14 of 20 steps" in html.value
    page.preset.by_hand("conditional only")
    assert "None of the 20 steps" in html.value and (page.lo.value, page.hi.value) == (0.28, 0)
    page.preset.by_hand("sdxl")
    assert (page.lo.value, page.hi.value) == (0.28, 5.42)
    page.host["txt2img_prompt"].value = "a cat AND a dog"
    page.host["txt2img_prompt"].fire()
    assert "49 network evaluations per image instead of 60" in html.value
    page.lo.by_hand(9)
    assert "swap them" in html.value and "<svg" not in html.value


def test_the_picture_is_drawn_again_when_an_image_is_done(page):
    page.host["txt2img_steps"].value = 10
    assert "of 20 steps" in page.html.value
    page.done.fire()
    assert "of 10 steps" in page.html.value
    assert not page.log.listeners, "which changes again and again by itself in Gradio 4"


def test_a_page_that_is_opened_shows_the_model_that_was_loaded_since(host):
    data = sys.modules["modules.sd_models"].model_data
    loaded, data.sd_model = data.sd_model, None
    ui = host.script.ui
    for name, value in SCHEDULE.items():
        ui.remember(Component(value), name)
    preset, *_ = ui.controls("txt2img", "new")
    html = preset.listeners[-1][2]
    assert "when a model is loaded" in html.value
    data.sd_model = loaded
    assert "9 of 20 steps are guided" in html.load()


def test_an_own_preset_with_an_open_end_stays_chosen(host, page, monkeypatch):
    import dataclasses

    st = host.script.settings
    own = dataclasses.replace(st.get_preset("sdxl"), sigma_hi=float("inf"))
    monkeypatch.setitem(st.PRESETS, "mine", own)
    monkeypatch.setattr(st, "PRESET_NAMES", [*st.PRESET_NAMES, "mine"])
    known = st.get_preset
    monkeypatch.setattr(st, "get_preset", lambda name: own if name == "mine" else known(name))
    page.preset.by_hand("mine")
    assert (page.preset.value, page.lo.value, page.hi.value) == ("mine", 0.28, 0.0)
    assert "14 of 20 steps" in page.html.value
    page.hi.by_hand(5.42)
    assert page.preset.value == "sdxl"
    page.hi.by_hand(0)
    assert page.preset.value == "mine"


def test_a_bound_that_another_tab_sends_leaves_the_preset(page):
    """ "Send to img2img" sets the bounds beside "conditional only"."""
    page.preset.take("conditional only")
    page.lo.take(1.0)
    page.hi.take(2.0)
    assert page.preset.value == "conditional only" and "None of the 20 steps" in page.html.value


def test_the_bars_stay_while_an_image_is_made(host, page):
    bars = page.html.value
    with host.lock:
        page.host["txt2img_steps"].value = 30
        page.host["txt2img_steps"].fire()
        assert "An image is being made" in page.html.value and bars in page.html.value
        assert "opacity:0.4" in page.html.value, "they are not those of the controls"
        page.host["txt2img_steps"].value = 31
        page.host["txt2img_steps"].fire()
        assert page.html.value.count("An image is being made") == 1
    page.done.fire()
    assert "of 31 steps" in page.html.value and "opacity:0.4" not in page.html.value


def test_what_is_wrong_is_a_warning_and_what_is_missing_is_not(host):
    ui = host.script.ui
    values = {"sampler": "Euler", "scheduler": "Karras", "steps": 8}
    wrong = ui.picture_of(("custom", 5, 1, "Both passes"), values)
    assert 'role="alert"' in wrong and "--error-text-color" in wrong
    missing = ui.picture_of(ON[1:], {})
    assert "after this script's" in missing and "error" not in missing


def test_what_a_sampler_says_is_no_markup(host):
    def failing(model, x, sigmas, extra_args=None, callback=None, disable=None):
        raise IndexError("<img src=x>")

    host.functions["failing"] = failing
    html = host.script.ui.picture_of(ON[1:], {"sampler": "failing", "scheduler": "Karras", "steps": 8})
    assert "&lt;img" in html and "<img" not in html


def test_why_there_is_no_picture(host):
    ui = host.script.ui
    ours, values = ON[1:], {"sampler": "Euler", "scheduler": "Karras", "steps": 8}
    assert "8 steps" in ui.picture_of(ours, values)
    assert "after this script's" in ui.picture_of(ours, {})
    assert "steps is empty" in ui.picture_of(ours, {**values, "steps": None})
    assert "8 steps" in ui.picture_of(ours, {**values, "hires_denoising_strength": None})
    hires = {"hires": True, "hires_denoising_strength": None}
    assert "hires denoising strength is empty" in ui.picture_of(ours, {**values, **hires})
    assert "Heun++: the steps cannot be told (AssertionError: bad" in ui.picture_of(
        ours, {**values, "sampler": "Heun++"}
    )
    with host.lock:
        assert "8 steps" in ui.picture_of(ours, values), "a schedule that is known"
        assert "An image is being made" in ui.picture_of(ours, {**values, "steps": 9})
    host.shared.opts.data["s_min_uncond"] = 0.5
    assert "NGMS or Skip Early CFG is on" in ui.picture_of(ours, values)
    sys.modules["modules.sd_models"].model_data.sd_model = None
    assert "when a model is loaded" in ui.picture_of(ours, values)


# ----------------------------------------------------------------------------
# Pasting.

NOTHING = {}  # An update of nothing.
LINE = "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Guidance interval: {}, Version: v1.9"


class Fields:
    """The accordion's paste fields, and what the host does with them."""

    def __init__(self, host):
        self.host = host
        self.script = host.runner.alwayson_scripts[0]
        self.fields = self.script.infotext_fields

    def from_params(self, params):
        """The API's `infotext`, which asks no callback."""
        return [target(params) for _, target in self.fields]

    def from_text(self, infotext):
        """modules.infotext_utils' paste_func: the host cuts a value at its first comma."""
        line = infotext.rpartition("\n")[2]
        params = {key.strip(): value for key, _, value in (part.partition(": ") for part in line.split(","))}
        for callback in self.host.callbacks["infotext_pasted"]:
            callback(infotext, params)
        return self.from_params(params)


@pytest.fixture
def fields(host):
    return Fields(host)


def test_pasting_leaves_alone_what_is_not_named(fields):
    quiet = {"value": "", "visible": False}
    assert fields.from_params({"Guidance interval": "0.28-inf"}) == [
        True, "custom", 0.28, 0.0, "Both passes", quiet,
    ]  # fmt: skip
    assert fields.from_params({"Guidance interval": "conditional only"}) == [
        True, "conditional only", NOTHING, NOTHING, "Both passes", quiet,
    ]  # fmt: skip
    assert fields.from_params({}) == [False, NOTHING, NOTHING, NOTHING, NOTHING, quiet]


def test_a_pasted_text_is_read_whole(fields):
    """The host's parser gives "0" and "0.28-5" of these."""
    for value in ("0,28-5,42", "0.28-5,42", "(0.28, 5.42]"):
        assert fields.from_text(LINE.format(value))[:4] == [True, "sdxl", 0.28, 5.42]
    assert fields.from_text("Steps: 20, Sampler: Euler")[0] is False


def test_what_the_host_has_left_out_stays_out(host):
    """By "Disregard fields from pasted infotext", for one."""
    params = {"Steps": "20"}
    host.callbacks["infotext_pasted"][0](LINE.format("1-2"), params)
    assert params == {"Steps": "20"}


def test_what_cannot_be_read_changes_nothing_and_is_said_on_the_page(fields):
    *controls, note = fields.from_text(LINE.format("5.42-0.28"))
    assert controls == [NOTHING] * 5, "the accordion is not switched off without a word"
    assert note["visible"] and "swap them" in note["value"] and 'role="alert"' in note["value"]


def test_the_api_refuses_what_cannot_be_read(host, fields):
    with pytest.raises(ValueError, match="swap them") as e:
        fields.from_params({"Guidance interval": "5.42-0.28"})
    assert e.value.status_code == 422


def test_what_the_user_does_by_hand_ends_the_note(host, fields):
    enabled, preset, lo, hi, _ = (component for component, _ in fields.fields[:5])
    note = fields.fields[5][0]
    for component, value in ((preset, "custom"), (lo, 0.3), (hi, 6.0)):
        note.take({"value": "said", "visible": True})
        component.by_hand(value)
        assert not note.visible
    note.take({"value": "said", "visible": True})
    enabled.take(True)
    assert note.visible, "pasting itself changes controls"


@pytest.mark.parametrize("skipped", ["Guidance interval", "Guidance interval sigma_hi"])
def test_fields_that_the_user_disregards_stay(host, fields, skipped):
    """ "Disregard fields from pasted infotext"."""
    host.shared.opts.infotext_skip_pasting = [skipped]
    pasted = fields.from_text(LINE.format("0.28-5.42"))[:5]
    expected = [True, "sdxl", 0.28, NOTHING, "Both passes"]
    assert pasted == ([NOTHING] * 5 if skipped == "Guidance interval" else expected)


def test_send_to_finds_every_field_by_its_name(host, fields):
    """The gallery's buttons pair the fields of both tabs whose names are among the script's."""
    names = fields.script.paste_field_names
    found = [component for component, name in fields.fields if name in names]
    assert found == [component for component, _ in fields.fields] and len(set(names)) == 6
    other = type(fields.script)()
    other.ui(True)
    assert [str(name) for _, name in other.infotext_fields] == [str(name) for _, name in fields.fields]


# ----------------------------------------------------------------------------
# What a sampler will evaluate.


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "Heun", "DPM++ 2M"])
def test_what_is_told_is_what_is_counted(host, sampler):
    evaluations, st = host.script.ui.evaluations, host.script.settings
    settings = st.from_controls(*ON[1:])
    for steps in (1, 3, 20):
        controls = {"sampler": sampler, "scheduler": "Karras", "steps": steps}
        (one,) = evaluations.passes(controls, settings)
        p, _ = generate(host, ON, sampler_name=sampler, steps=steps)
        assert p.guidance_interval_rows == one.rows, steps
        assert one.rows_everywhere == 2 * (2 * steps - 1 if sampler == "Heun" else steps)


def test_churn_raises_the_noise_level_that_is_evaluated(host):
    evaluations, st = host.script.ui.evaluations, host.script.settings
    controls = {"sampler": "Euler", "scheduler": "Karras", "steps": 8}
    (plain,) = evaluations.passes(controls, st.from_controls(*ON[1:]))
    host.shared.opts.s_churn = 2.0
    (churned,) = evaluations.passes(controls, st.from_controls(*ON[1:]))
    assert churned.sigmas == pytest.approx([s * 1.25 for s in plain.sigmas])


@pytest.fixture
def told(host):
    """`told(**controls)`: the passes of 20 steps of Euler."""
    evaluations, st = host.script.ui.evaluations, host.script.settings
    controls = {"sampler": "Euler", "scheduler": "Karras", "steps": 20}

    def passes(**changed):
        return evaluations.passes({**controls, **changed}, st.from_controls(*ON[1:]))

    return passes


def test_img2img_and_hires_fix_end_the_schedule(host):
    evaluations, st = host.script.ui.evaluations, host.script.settings
    settings = st.from_controls("custom", 0.28, 5.42, "First pass only")
    controls = {"sampler": "Euler", "scheduler": "Karras", "steps": 20}
    (whole,) = evaluations.passes(controls, settings)
    (half,) = evaluations.passes({**controls, "denoising_strength": 0.5}, settings)
    assert half.sigmas == pytest.approx(whole.sigmas[9:])
    hires = {"hires": True, "hires_steps": 5, "hires_denoising_strength": 0.5, "hires_prompt": "a AND b"}
    first, second = evaluations.passes({**controls, **hires}, settings)
    assert first == whole and len(second.sigmas) == 5 and second.cond == 2
    assert all(second.guided), "the second pass is the host's"
    (styled,) = evaluations.passes({**controls, "prompt": "a", "styles": ["b", "c"]}, settings)
    assert styled.cond == 3


HIRES = {"hires": True, "hires_steps": 20, "hires_denoising_strength": 0.5}


def test_the_second_pass_has_its_own_schedule(told):
    (exponential,) = told(scheduler="Exponential", denoising_strength=0.5)
    first, second = told(**HIRES, hires_scheduler="Exponential")
    assert second.sigmas[0] == pytest.approx(told(scheduler="Exponential", **HIRES)[1].sigmas[0])
    assert second.sigmas != told(**HIRES)[1].sigmas and first == told()[0]
    assert told(**HIRES, hires_scheduler="Use same scheduler") == told(**HIRES)
    assert told(**HIRES | {"hires_steps": 0}) == told(**HIRES), "0, as it is at first: as many as the first pass has"
    assert exponential.sigmas != told(denoising_strength=0.5)[0].sigmas


def test_a_schedule_may_go_by_the_size_of_the_image(told):
    """Forge Neo's Flux2; in the second pass of hires fix, by that of the enlarged one."""

    def top(**controls):
        return [one.sigmas[0] for one in told(scheduler="Flux2", **controls)]

    assert top() == pytest.approx([14.6]), "from the model of the run"
    assert top(width=1024, height=512) == pytest.approx([29.2])
    whole = {"hires": True, "hires_steps": 20, "hires_denoising_strength": 0.999, "width": 512, "height": 512}
    first, second = top(**whole, hr_scale=2.0)
    assert first == pytest.approx(14.6) and second == pytest.approx(4 * 14.6 * 20 / 21, rel=0.06)
    _, sized = top(**whole, hr_scale=2.0, hr_resize_x=1024, hr_resize_y=512)
    assert sized == pytest.approx(second / 2)


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("a cat AND a dog", 2),
        ("a cat # AND a dog", 1),
        ("a cat # AND a dog\nAND a bird", 2),
        ("a cat <lora:this AND that:1>", 1),
        (None, 1),
    ],
)
def test_prompts_are_counted_as_the_text_encoder_meets_them(told, prompt, rows):
    (one,) = told(prompt=prompt)
    assert one.cond == rows
    assert told(**HIRES, prompt="a", hires_prompt=prompt or "")[1].cond == rows
    assert told(prompt="a", styles=["b # AND c"])[0].cond == 2


def test_options_that_change_the_models_noise_levels_are_followed_at_once(host, told):
    """The host sets them when it begins an image; a trial run leaves them as they were."""
    stock = host.model.alphas_cumprod
    (before,) = told()
    host.shared.opts.data["alphas"] = 0.5
    (after,) = told()
    assert after.sigmas[0] == pytest.approx(before.sigmas[0] / 2)
    assert host.model.alphas_cumprod is stock


@pytest.mark.parametrize("how", ["the option", "the model"])
def test_forges_zero_terminal_snr_is_followed_at_once(host, told, how):
    predictor = types.SimpleNamespace(sigmas=SIGMAS)
    predictor.set_sigmas = lambda sigmas: setattr(predictor, "sigmas", sigmas)
    unet = types.SimpleNamespace(model=types.SimpleNamespace(predictor=predictor))
    host.model.forge_objects = types.SimpleNamespace(unet=unet)
    host.model.model_config = types.SimpleNamespace(ztsnr=False)
    host.model.network = forge_network(host.model)
    assert told()[0].sigmas[0] == pytest.approx(14.6, rel=0.01)
    host.shared.opts.sd_noise_schedule = "Zero Terminal SNR" if how == "the option" else "Default"
    host.model.model_config.ztsnr = how == "the model"
    stock = host.model.alphas_cumprod  # reForge's samplers go by them, so that both are set.
    assert told()[0].sigmas[0] == pytest.approx(4518.0)
    assert predictor.sigmas is SIGMAS and host.model.alphas_cumprod is stock


def forge_network(model):
    """A denoiser's inner model over Forge's, whose noise levels are the predictor's."""

    class Inner(torch.nn.Module):
        sigmas = property(lambda self: model.forge_objects.unet.model.predictor.sigmas)
        inner_model = property(lambda self: model)

    return Inner()


def test_forges_hires_cfg_is_that_of_the_second_pass(host, told):
    predictor = types.SimpleNamespace(sigmas=SIGMAS)
    unet = types.SimpleNamespace(model=types.SimpleNamespace(predictor=predictor))
    host.model.forge_objects = types.SimpleNamespace(unet=unet)
    host.model.network = forge_network(host.model)
    assert [one.uncond for one in told(**HIRES, hires_cfg_scale=1.0)] == [1, 0]
    assert [one.uncond for one in told(**HIRES, cfg_scale=1.0, hires_cfg_scale=0.0)] == [0, 0], "as the first pass"


CHANGES = {
    "sampler": {"sampler": "DPM++ 2M"},
    "scheduler": {"scheduler": "Exponential"},
    "steps": {"steps": 21},
    "denoising": {"denoising_strength": 0.5},
    "width": {"width": 640},
    "hires steps": {**HIRES, "hires_steps": 19},
    "hires denoising": {**HIRES, "hires_denoising_strength": 0.4},
    "hires scheduler": {**HIRES, "hires_scheduler": "Exponential"},
    "hires size": {**HIRES, "hr_scale": 1.5},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kept_schedule_is_shown_for_nothing_else(host, told, change):
    told(), told(**HIRES)
    evaluations = host.script.ui.evaluations
    with host.lock:
        told(), told(**HIRES)
        with pytest.raises(evaluations.Busy):
            told(**CHANGES[change])


def test_a_kept_schedule_is_that_of_its_pass(host, told):
    """The same sampler, steps and strength are one schedule in img2img and another in hires fix."""
    told(denoising_strength=0.5)
    with host.lock, pytest.raises(host.script.ui.evaluations.Busy):
        told(**HIRES)


def test_a_kept_schedule_is_that_of_its_options_and_its_model(host, told):
    told()
    busy = host.script.ui.evaluations.Busy
    host.shared.opts.data["eta_ancestral"] = 0.5
    with host.lock, pytest.raises(busy):
        told()
    del host.shared.opts.data["eta_ancestral"]
    with host.lock:
        told()
        sys.modules["modules.sd_models"].model_data.sd_model = copy.copy(host.model)
        with pytest.raises(busy):
            told()


def test_two_pictures_that_are_drawn_at_once_do_not_take_each_other_for_an_image(host, told):
    begun, go_on = threading.Event(), threading.Event()

    def slow(model, x, sigmas, extra_args=None, callback=None, disable=None):
        begun.set()
        assert go_on.wait(20)
        model(x, sigmas[:1])

    host.functions["slow"] = slow
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(told, sampler="slow")
        assert begun.wait(20)
        second = pool.submit(told, steps=7)
        assert not wait([second], timeout=0.2).done, "it waits for the other, or says that it is busy"
        go_on.set()
        assert len(first.result()[0].sigmas) == 1 and len(second.result()[0].sigmas) == 7


def test_no_more_than_the_last_schedules_are_kept(host, told):
    evaluations = host.script.ui.evaluations
    for steps in range(1, evaluations.MAX_KEPT + 2):
        told(steps=steps)
    assert len(evaluations._kept) == evaluations.MAX_KEPT
    with host.lock:
        told(steps=2)
        with pytest.raises(evaluations.Busy):
            told(steps=1)


def test_a_sampler_that_goes_by_the_image_is_not_told(host):
    def adaptive(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma in sigmas[:-1]:
            for _ in range(2 if model(x, sigma[None]).any() else 1):
                model(x, sigma[None])

    def impatient(model, x, sigmas, extra_args=None, callback=None, disable=None):
        if model(x, sigmas[:1]).any():
            raise AssertionError("too many steps")

    def unsuited(model, x, sigmas, extra_args=None, callback=None, disable=None):
        model(x, ((1 - sigmas[:1]) / sigmas[:1]).log())

    def endless(model, x, sigmas, extra_args=None, callback=None, disable=None):
        while True:
            model(x, sigmas[:1])

    def never(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return x

    def failing(model, x, sigmas, extra_args=None, callback=None, disable=None):
        raise IndexError("steps")

    host.functions |= {"adaptive": adaptive, "impatient": impatient, "unsuited": unsuited, "endless": endless}
    host.functions |= {"never": never, "failing": failing}
    evaluations, st = host.script.ui.evaluations, host.script.settings
    said = {
        "adaptive": "depends on the image",
        "impatient": "depends on the image",
        "unsuited": "does not suit this model",
        "endless": "depends on the image",
        "never": "at no step",
        "failing": "IndexError: steps",
    }
    for name, reason in said.items():
        with pytest.raises(evaluations.Unknown, match=reason):
            evaluations.passes({"sampler": name, "scheduler": "Karras", "steps": 4}, st.from_controls(*ON[1:]))
    assert not host.lock.locked()


def test_a_trial_run_leaves_the_hosts_random_numbers_alone(host):
    theirs = host.sampling.torch
    state = torch.random.get_rng_state()
    evaluations, st = host.script.ui.evaluations, host.script.settings
    controls = {"sampler": "Euler a", "scheduler": "Karras", "steps": 8}
    evaluations.passes(controls, st.from_controls(*ON[1:]))
    assert host.sampling.torch is theirs and torch.equal(torch.random.get_rng_state(), state)


# ----------------------------------------------------------------------------
# Forge: its unet patcher, its modifiers and its sampling function.


class Forge:
    """A denoiser of Forge at one call, whose network adds the mean of its text; `rows` it evaluated."""

    def __init__(self, patch, settings, guided, options=None, weights=(1.0,)):
        self.rows = 0
        self.weights = weights
        unet = types.SimpleNamespace(model=self, model_options=dict(options or {}), memory=7)
        self.objects = types.SimpleNamespace(unet=unet)
        self.predictor = types.SimpleNamespace(sigmas=SIGMAS)
        inner = types.SimpleNamespace(inner_model=types.SimpleNamespace(forge_objects=self.objects))
        self.generation = patch.Generation(settings.Settings(GuidanceInterval() if guided else None))
        p = types.SimpleNamespace(guidance_interval=self.generation, is_hr_pass=False)
        self.params = types.SimpleNamespace(
            x=torch.randn(2, 4, 8, 8),
            sigma=torch.full((2,), 2.0),
            text_cond=[torch.full((2, 3), float(i + 1)) for i in range(len(weights))],
            text_uncond=[torch.zeros(2, 3)],
            denoiser=types.SimpleNamespace(inner_model=inner, p=p),
        )

    def calc(self, conds, x):
        """The mean of the conds by their strength, in rows of the batch."""
        if conds is None:
            return torch.zeros_like(x)
        self.rows += len(x) * len(conds)
        total = sum(c["strength"] for c in conds)
        return sum((x * 0.5 + c["text"].mean(1)[:, None, None, None]) * c["strength"] for c in conds) / total

    def sample(self, cond_scale=7.0):
        """`(denoised, cond, uncond)` as backend/sampling/sampling_function.py makes them."""
        unet = self.objects.unet
        assert unet.memory == 7
        x, sigma, options = self.params.x, self.params.sigma, unet.model_options
        cond = [{"text": t, "strength": w} for t, w in zip(self.params.text_cond, self.weights, strict=True)]
        uncond = [{"text": t, "strength": 1.0} for t in self.params.text_uncond]
        model, seed = self, 0
        for modifier in options.get("conditioning_modifiers", []):
            model, x, sigma, uncond, cond, cond_scale, options, seed = modifier(
                model, x, sigma, uncond, cond, cond_scale, options, seed
            )
        strength = sum(c["strength"] for c in cond)
        if abs(cond_scale - 1) < 1e-9 and not options.get("disable_cfg1_optimization", False):
            uncond = None
        c, u = self.calc(cond, x), self.calc(uncond, x)
        if "sampler_cfg_function" in options:
            out = x - options["sampler_cfg_function"]({"cond": x - c, "uncond": x - u, "cond_scale": cond_scale})
        else:
            out = u + (c - u) * cond_scale * strength
        for function in options.get("sampler_post_cfg_function", []):
            out = function({"denoised": out, "cond_denoised": c, "uncond_denoised": u, "model_options": options})
        return out, c, u


@pytest.fixture
def forge():
    from guidance_interval.a1111 import patch, settings

    def make(*args, **kwargs):
        made = Forge(patch, settings, *args, **kwargs)
        made.stock = made.sample()
        made.rows, made.first = 0, made.objects.unet
        patch.on_cfg_denoiser(made.params)
        return made

    return make


@pytest.mark.parametrize("weights", [(1.0,), (1.2, 0.6), (0.5,)])
def test_forge_outside_is_the_conditional_prediction(forge, weights):
    made = forge(False, weights=weights)
    out, c, u = made.sample()
    assert torch.equal(out, made.stock[1]) and torch.equal(out, c) and torch.equal(u, c)
    assert made.rows == made.generation.rows == 2 * len(weights)
    assert made.objects.unet is made.first and not made.first.model_options, "what was put in place lasts for one call"


def test_forge_inside_is_the_hosts_own(forge):
    made = forge(True)
    for ours, theirs in zip(made.sample(), made.stock, strict=True):
        assert torch.equal(ours, theirs)
    assert made.rows == made.generation.rows == 4


def test_forge_at_a_cfg_scale_of_1_is_counted_as_it_runs(forge):
    made = forge(True)
    made.sample(cond_scale=1.0)
    assert made.rows == made.generation.rows == 2


def test_forge_keeps_the_functions_after_cfg_and_drops_another_formula(forge):
    called = []

    def formula(args):
        called.append(args)
        return args["uncond"] * 100

    def masked(args):
        return args["denoised"] + 1

    made = forge(False, {"sampler_cfg_function": formula, "sampler_post_cfg_function": [masked]})
    called.clear()
    out, c, _ = made.sample()
    assert torch.equal(out, c + 1) and not called
    assert made.first.model_options["sampler_post_cfg_function"] == [masked]


def test_forge_evaluates_uncond_for_a_patch_that_insists(forge):
    made = forge(False, {"disable_cfg1_optimization": True})
    out, c, u = made.sample()
    assert torch.equal(out, c) and torch.equal(u, made.stock[2]), "self-attention guidance reads it"
    assert made.rows == made.generation.rows == 4


def test_forge_other_modifiers_go_first_and_ours_has_the_last_word(forge):
    def other(model, x, sigma, uncond, cond, cond_scale, options, seed):
        return model, x, sigma, uncond, cond, 3.0, {**options, "disable_cfg1_optimization": True}, seed

    made = forge(False, {"conditioning_modifiers": [other]})
    out, c, _ = made.sample()
    assert torch.equal(out, c) and made.rows == 2, "a sampler's own wish for uncond is not a patch of the unet's"
    assert made.first.model_options["conditioning_modifiers"] == [other]


def test_forge_an_error_before_the_modifiers_leaves_nothing(forge):
    from guidance_interval.a1111 import patch

    made = forge(False)
    patch.on_cfg_denoiser(made.params)  # The host failed in between, and tries again.
    made.sample()
    assert made.objects.unet is made.first and made.generation.rows == 2
