/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory that LLNL UMap pages, over a store that is compressed RAM: one LZ4 block for a page, as gmem's tier has it.
 * Loaded by pager.py; UMAP_PAGESIZE and UMAP_BUFSIZE are what the process has in its environment.
 */
#include <cstdlib>
#include <cstring>
#include <vector>

#include <umap/umap.h>

extern "C" {
/* lz4.h of liblz4 1.9; its ABI is stable */
int LZ4_compressBound(int bytes);
int LZ4_compress_default(const char *from, char *to, int bytes, int room);
int LZ4_decompress_safe(const char *from, char *to, int bytes, int room);

void *workload_map(size_t bytes);
}

class PackedStore : public Umap::Store {
public:
	PackedStore(size_t bytes, size_t page_bytes) : page_bytes(page_bytes), blocks(bytes / page_bytes) {}

	ssize_t read_from_store(char *buffer, size_t bytes, off_t offset) override
	{
		for (size_t done = 0; done < bytes; done += page_bytes)
			if (!unpack(blocks[(static_cast<size_t>(offset) + done) / page_bytes], buffer + done))
				return -1;
		return static_cast<ssize_t>(bytes);
	}

	ssize_t write_to_store(char *buffer, size_t bytes, off_t offset) override
	{
		for (size_t done = 0; done < bytes; done += page_bytes)
			pack(blocks[(static_cast<size_t>(offset) + done) / page_bytes], buffer + done);
		return static_cast<ssize_t>(bytes);
	}

private:
	using Block = std::vector<char>;

	bool unpack(const Block &block, char *to) const
	{
		int page = static_cast<int>(page_bytes);

		if (block.empty())
			memset(to, 0, page_bytes);
		else if (block.size() == page_bytes)
			memcpy(to, block.data(), page_bytes);
		else
			return LZ4_decompress_safe(block.data(), to, static_cast<int>(block.size()), page) == page;
		return true;
	}

	void pack(Block &block, const char *from) const
	{
		thread_local std::vector<char> scratch;
		int packed;

		scratch.resize(static_cast<size_t>(LZ4_compressBound(static_cast<int>(page_bytes))));
		packed = LZ4_compress_default(from, scratch.data(), static_cast<int>(page_bytes),
					      static_cast<int>(scratch.size()));
		if (packed <= 0 || static_cast<size_t>(packed) > page_bytes - page_bytes / 8)
			block.assign(from, from + page_bytes);
		else
			block.assign(scratch.data(), scratch.data() + packed);
	}

	const size_t page_bytes;
	std::vector<Block> blocks;
};

/* Never given back: UMap's workers do not end by themselves, and the process is about to. NULL: UMap has said why. */
void *workload_map(size_t bytes)
{
	size_t page_bytes = umapcfg_get_umap_page_size();
	void *at = Umap::umap_ex(nullptr, bytes, PROT_READ | PROT_WRITE, UMAP_PRIVATE, -1, 0,
				 new PackedStore(bytes, page_bytes));

	return at == UMAP_FAILED ? nullptr : at;
}
