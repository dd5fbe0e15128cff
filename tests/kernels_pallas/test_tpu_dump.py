"""What is read out of the TPU compiler's dump: loops by their trip counts, predicated regions, use of the units."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))

import tpu_dump

# A grid of 6 steps (8 turns), in it a branch over three bundles that hold a loop of 4 turns, from 2 by 2 up to 10.
PROGRAM = """
control target key start
LB: loop body
     0   :  { %s1_s1 = smov.u32 0 }
   0x1   :  { %s2_s2 = smov.u32 2 }
   0x2 LB: > { %s10_s3 = sphi %s1_s1, %s11_s3 /* iteration index, stage = 0 */ }
   0x3   : > { %9 = sbr.rel (%p1_p1) target = $region20 } /* Start region 10 */
   0x4   : > { %8 = sbr.rel (%p2_p2) target = $region12 } /* Start region 11 */
   0x5   :  {}
   0x6 LB: > > { %s20_s4 = sphi %s2_s2, %s21_s4 }
   0x7   : > > { %s21_s4 = sadd.s32 2, %s20_s4 }
   0x8   : > > { %p3_p3 = scmp.ge.s32.totalorder %s21_s4, 10 /* loop exit test */ }
   0x9 PF: > { %v1_v1 = vadd.f32 %v1_v1, %v1_v1 } /* Start/End empty region 12 */
   0xa   : > { %v1_v1 = vadd.f32 %v1_v1, %v1_v1 }
   0xb PF: > { %s11_s3 = sadd.s32 1, %s10_s3 } /* Start/End empty region 20 */
   0xc   : > { %p4_p4 = scmp.ge.s32.totalorder %s11_s3, 8 /* loop exit test */ }
   0xd   :  { %10 = vsyncpa [#allocation5], 1 }
"""
USE = """== CAPACTIY:
MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     2     4     2     1     3     3     2     2     2
== UTILIZATION:
"""


@pytest.fixture
def dump(tmp_path):
    program, use = (
        tmp_path / f"1-op_forward.1-{name}.txt"
        for name in ("3-final_bundles", "1-final_hlo-static-per-bundle-utilization")
    )
    program.write_text(PROGRAM)
    rows = [[0] * 11 for _ in range(14)]
    rows[7][0] = 2  # both matrix slots, in the inner loop
    rows[10][9] = 1  # a spill, once a step
    use.write_text(USE + "\n".join(" ".join(map(str, row)) for row in rows) + "\n")
    (tmp_path / "1-op_forward.1-2-schedule-analysis_final_bundles.txt").write_text("")
    (tmp_path / "1-other.1-3-final_bundles.txt").write_text("")
    return tmp_path


def read(dump, **options):
    ((program, use),) = tpu_dump.kernels(dump, ["op_forward"])["op_forward"]
    return tpu_dump.read("op_forward", program, use, **options)


def test_loops_count_as_often_as_they_turn(dump):
    found = read(dump)
    assert (found.whole, found.step, found.steps) == (14, 11, 6)
    assert found.cycles == 3 + 6 * (8 + 4 * 3)  # around the loop over the grid; a step, its inner loop four times
    assert found.matrix == pytest.approx(6 * 4 * 2 / (2 * found.cycles))
    assert found.spills == pytest.approx(6 / found.cycles)


def test_a_loop_goes_to_the_branch_back_to_its_start(dump):
    """What acts at the exit of a loop may stand within it, a depth less; a pipelined loop has much behind that."""
    (program,) = dump.glob("*op_forward*-3-final_bundles.txt")
    text = PROGRAM.replace("%s2_s2, %s21_s4 }", "%s2_s2, %s21_s4 } /* Start region 30 */")
    text = text.replace("0x7   : > > {", "0x7   : > { %s5_s5 = smov.u32 (%p3_p3), 0 }  {")
    text = text.replace(
        "10 /* loop exit test */ }", "10 /* loop exit test */  ;;  %7 = sbr.rel (!%p3_p3) target = $region30 }"
    )
    program.write_text(text)
    assert read(dump).cycles == 3 + 6 * (8 + 4 * 3)


def test_a_region_counts_in_the_steps_that_run_it(dump):
    assert read(dump).regions == (4,)  # the step itself, which the pipeline may leave out, is none
    assert read(dump, shares=(0.5,)).cycles == 3 + 6 * (7 + 0.5 * (1 + 4 * 3))


def test_a_loop_of_unknown_length_needs_its_turns(dump):
    (program,) = dump.glob("*op_forward*-3-final_bundles.txt")
    program.write_text(PROGRAM.replace("%s21_s4, 10 /*", "%s21_s4, %s99_s9 /*"))
    with pytest.raises(ValueError, match="op_forward: the loop at bundle 0x6 has no constant trip count"):
        read(dump)
    assert read(dump, turns=(5,)).cycles == 3 + 6 * (8 + 5 * 3)
