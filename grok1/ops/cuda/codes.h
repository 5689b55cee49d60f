// What the codes of 4-bit weights stand for.
#pragma once

// Picks bytes by codes. Three bits of a code pick in a half of the book; where the fourth is set, the
// instruction gives the sign of what they pick. That is -1 in the first half, all of which is negative,
// and 0 in the second, which is positive with 1 added and picked by codes whose fourth bit is turned.
// So the sum of both picks is what a code stands for.
class Book {
 public:
  DEVICE Book() {
    // The same for all lanes, which the assembler is not to see: it would copy them where they are used.
    const unsigned lane = threadIdx.x % 32, zero = kept(lane) - lane;
    first_[0] = kept(zero + 0xbfad9881u);
    first_[1] = kept(zero + 0xf6eaddcfu);
    second_[0] = kept(zero + 0x271a0e02u);
    second_[1] = kept(zero + 0x725a4636u);
  }

  // Both picks by the codes of the lower half of a word, and by those of its upper half.
  DEVICE void read(unsigned word, unsigned (&lower)[2], unsigned (&upper)[2]) const {
    const unsigned turned = word ^ 0x88888888u;
    lower[0] = pick_signed(first_[0], first_[1], word);
    lower[1] = pick_signed(second_[0], second_[1], turned);
    upper[0] = pick_signed(first_[0], first_[1], word >> 16);
    upper[1] = pick_signed(second_[0], second_[1], turned >> 16);
  }

  // What four codes stand for: the sum of both picks, byte by byte.
  static DEVICE unsigned together(const unsigned (&picks)[2]) {
    return ((picks[0] & 0x7f7f7f7fu) + picks[1]) ^ (picks[0] & 0x80808080u);
  }

 private:
  unsigned first_[2], second_[2];
};
