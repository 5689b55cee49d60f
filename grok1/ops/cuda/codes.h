// What the codes of 4-bit weights stand for.
#pragma once

// Picks bytes by codes.
class Book {
 public:
  DEVICE Book() {
    // The same for all lanes, which the assembler is not to see: it would copy them where they are used.
    const unsigned lane = threadIdx.x % 32, zero = kept(lane) - lane;
    bytes_[0] = kept(zero + 0xbfad9881u);
    bytes_[1] = kept(zero + 0xf6eaddcfu);
    bytes_[2] = kept(zero + 0x26190d01u);
    bytes_[3] = kept(zero + 0x71594535u);
    places_ = kept(zero + 0x32103210u);
    zeros_ = kept(zero + 0x80008000u);
  }

  // What the codes of a word stand for: those of its lower half, and of its upper.
  DEVICE void read(unsigned word, unsigned& lower, unsigned& upper) const {
    // Three bits pick in either half of the book, the fourth picks the half.
    const unsigned in_half = word & 0x77777777u;
    const unsigned half = (word >> 1 & 0x44444444u) | places_;
    lower = picked(in_half, half);
    // Where integers are shifted there is more to do than where floats are added.
    upper = picked(upper_half(in_half, zeros_), upper_half(half, zeros_));
  }

 private:
  unsigned bytes_[4], places_, zeros_;

  DEVICE unsigned picked(unsigned in_half, unsigned half) const {
    return pick_signed(pick_signed(bytes_[0], bytes_[1], in_half),
                       pick_signed(bytes_[2], bytes_[3], in_half), half);
  }
};
