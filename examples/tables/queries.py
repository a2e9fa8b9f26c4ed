"""What people ask the example catalogue, and what they need.

`types` are the product types (or accessories) asked for, `want` what a perfect answer has: a feature key, or
`color=black`, `brand=Norvik`, `fits=headphones`. `near` are types that would do if all of `want` is met.
Most queries use other words than the products' sentences do, as people do.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Query:
    lang: str
    kind: str
    text: str
    types: tuple[str, ...] = ()
    want: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    # The model number of the one product that is meant.
    model: str = ""


@dataclass(frozen=True)
class ModelQuery:
    """Asks for one product by its model number: the `nth` of its type that is sold in `lang`.

    `{hyphen}`, `{joined}` and `{spaced}` in the text are NK-720X, NK720X and NK 720X. With `accessory`, what fits
    that product.
    """

    lang: str
    text: str
    type: str
    nth: int
    accessory: str = ""


def _ask(lang: str, kind: str, text: str, types: str, want: str = "", near: str = "") -> Query:
    return Query(lang, kind, text, tuple(types.split()), tuple(want.split()), tuple(near.split()))


QUERIES: tuple[Query | ModelQuery, ...] = (
    # English, electronics
    _ask("en", "natural", "headphones that block out noise on a plane", "headphones", "anc", "earbuds"),
    _ask("en", "keyword", "wireless noise cancelling headphones", "headphones", "anc wireless", "earbuds"),
    _ask("en", "natural", "headset for video meetings so people can hear me properly", "headphones", "boom_mic"),
    _ask("en", "natural", "headphones that won't damage my child's hearing", "headphones", "kids_safe"),
    _ask("en", "keyword", "foldable headphones long battery life", "headphones", "foldable long_battery"),
    _ask("en", "natural", "earphones to wear in bed at night", "earbuds", "sleep"),
    _ask("en", "natural", "earbuds for running that don't fall out when I sweat", "earbuds", "sweatproof"),
    _ask("en", "natural", "in-ear headphones without audio delay for mobile games", "earbuds", "low_latency"),
    _ask("en", "natural", "loudspeaker I can take into the shower", "speaker", "waterproof"),
    _ask("en", "attribute", "red waterproof bluetooth speaker", "speaker", "waterproof color=red"),
    _ask("en", "natural", "speaker to hang on my backpack while hiking", "speaker", "clip"),
    _ask("en", "natural", "speaker with disco lights for a birthday party", "speaker", "party_light"),
    _ask("en", "natural", "portable phone charger that sticks to the back of my phone", "power_bank", "magnetic"),
    _ask("en", "attribute", "slim power bank 10000mAh", "power_bank", "slim capacity=10000"),
    _ask("en", "natural", "charge my phone while camping with sunlight", "power_bank", "solar"),
    _ask("en", "natural", "small laptop charger that doesn't get hot", "charger", "gan"),
    _ask("en", "natural", "plug adapter for a trip overseas", "charger", "travel"),
    _ask("en", "attribute", "65W charger with several ports", "charger", "multi_port power=65w"),
    _ask("en", "natural", "keyboard that doesn't disturb my roommate", "keyboard", "quiet"),
    _ask("en", "natural", "keyboard for wrist pain", "keyboard", "ergonomic", "mouse"),
    _ask("en", "attribute", "compact wireless keyboard white", "keyboard", "compact wireless color=white"),
    _ask("en", "natural", "mouse for people with carpal tunnel", "mouse", "ergonomic"),
    _ask("en", "keyword", "silent wireless mouse", "mouse", "quiet wireless"),
    _ask("en", "natural", "screen for photo editing with fine detail", "monitor", "4k"),
    _ask("en", "attribute", "27-inch curved gaming monitor", "monitor", "curved high_refresh size=27"),
    _ask("en", "natural", "display that connects to a laptop with a single cable", "monitor", "usb_c"),
    _ask("en", "natural", "watch that tracks my route without a phone", "smartwatch", "gps"),
    _ask("en", "natural", "waterproof watch for the swimming pool", "smartwatch", "swim"),
    _ask("en", "natural", "watch that doesn't need charging every day", "smartwatch", "long_battery"),
    _ask("en", "natural", "camera for online meetings that I can cover when not in use", "webcam", "privacy"),
    _ask("en", "natural", "camera for video calls in a dark room", "webcam", "low_light"),
    _ask("en", "keyword", "sleep earbuds", "earbuds", "sleep"),
    _ask("en", "keyword", "magnetic wireless power bank", "power_bank", "magnetic"),
    _ask("en", "keyword", "rgb mechanical keyboard", "keyboard", "backlit"),
    _ask("en", "attribute", "32-inch 4k monitor with usb-c", "monitor", "4k usb_c size=32"),
    _ask("en", "attribute", "black gps smartwatch", "smartwatch", "gps color=black"),
    _ask("en", "keyword", "norvik webcam autofocus", "webcam", "autofocus brand=Norvik"),
    # English, clothing
    _ask("en", "natural", "shoes for jogging on muddy forest paths", "running_shoes", "trail"),
    _ask("en", "natural", "running shoes for bad knees", "running_shoes", "cushioned"),
    _ask("en", "attribute", "women's wide fit running shoes", "running_shoes", "wide gender=women"),
    _ask("en", "natural", "raincoat that folds up small enough for a handbag", "rain_jacket", "packable"),
    _ask("en", "natural", "waterproof jacket for cycling at night so cars notice me", "rain_jacket", "reflective"),
    _ask("en", "natural", "coat for a trip to Siberia in January", "down_jacket", "extreme"),
    _ask("en", "natural", "puffer without animal products", "down_jacket", "vegan"),
    _ask("en", "natural", "soft wool jumper that isn't scratchy", "sweater", "merino"),
    _ask("en", "natural", "sweater I can put in the washing machine", "sweater", "washable"),
    _ask("en", "attribute", "grey cashmere turtleneck", "sweater", "cashmere turtleneck color=grey"),
    _ask("en", "natural", "shirt that protects from sunburn", "tshirt", "uv", "hat"),
    _ask("en", "natural", "gym top that dries fast", "tshirt", "quick_dry"),
    _ask("en", "attribute", "men's trousers for hot summer weather", "trousers", "linen gender=men"),
    _ask("en", "natural", "pants that don't need ironing for business travel", "trousers", "wrinkle_free"),
    _ask("en", "natural", "socks to avoid swollen legs when flying", "socks", "compression"),
    _ask("en", "natural", "socks for smelly feet", "socks", "antibacterial"),
    _ask("en", "natural", "bag to carry my notebook computer to the office", "backpack", "laptop"),
    _ask("en", "natural", "rucksack that thieves can't open in a crowd", "backpack", "antitheft"),
    _ask("en", "natural", "warm hat to cover my ears in winter", "hat", "knit"),
    _ask("en", "keyword", "trail running shoes", "running_shoes", "trail"),
    _ask("en", "attribute", "kids hooded rain jacket red", "rain_jacket", "hooded gender=kids color=red"),
    _ask("en", "keyword", "ultralight down jacket", "down_jacket", "light"),
    _ask("en", "attribute", "navy blue striped t-shirt women", "tshirt", "striped gender=women color=navy"),
    _ask("en", "keyword", "waterproof laptop backpack", "backpack", "waterproof laptop"),
    # English, home
    _ask("en", "natural", "kettle for pour-over coffee", "kettle", "gooseneck"),
    _ask("en", "natural", "electric kettle that heats water to exactly 80 degrees", "kettle", "temp"),
    _ask("en", "natural", "pan that food doesn't stick to", "frying_pan", "nonstick"),
    _ask("en", "natural", "heavy skillet for searing steak", "frying_pan", "cast_iron"),
    _ask("en", "natural", "knife for cutting bread", "knife", "serrated"),
    _ask("en", "keyword", "damascus chef's knife with sheath", "knife", "damascus sheath"),
    _ask("en", "natural", "air cleaner for pollen allergy", "air_purifier", "hepa"),
    _ask("en", "natural", "get rid of cigarette smell in the room", "air_purifier", "carbon"),
    _ask("en", "natural", "automatic vacuum for a home with two cats", "robot_vacuum", "pet"),
    _ask("en", "natural", "robot that both sweeps and washes the floor", "robot_vacuum", "mop"),
    _ask("en", "natural", "light for studying that is easy on the eyes", "desk_lamp", "eye_care"),
    _ask("en", "natural", "lamp I can attach to the edge of a desk", "desk_lamp", "clamp"),
    _ask("en", "natural", "thin blanket for hot summer nights", "duvet", "summer"),
    _ask("en", "attribute", "king size winter duvet goose down", "duvet", "winter down size=king"),
    _ask("en", "natural", "pillow for neck pain", "pillow", "neck"),
    _ask("en", "natural", "see-through boxes to organise a wardrobe", "storage_box", "clear"),
    _ask("en", "natural", "flask that won't spill in my bag", "thermos", "leakproof"),
    _ask("en", "keyword", "memory foam pillow", "pillow", "memory_foam"),
    _ask("en", "attribute", "cast iron frying pan 28 cm", "frying_pan", "cast_iron size=28"),
    _ask("en", "keyword", "self-emptying robot vacuum", "robot_vacuum", "self_empty"),
    _ask("en", "keyword", "foldable storage box with lid", "storage_box", "foldable lid"),
    # English, groceries
    _ask("en", "natural", "coffee I can drink in the evening without staying awake", "coffee", "decaf"),
    _ask("en", "keyword", "organic dark roast espresso beans", "coffee", "organic dark"),
    _ask("en", "natural", "caffeine-free tea to help me relax before sleeping", "tea", "herbal"),
    _ask("en", "natural", "tea as a present for my teacher", "tea", "gift"),
    _ask("en", "natural", "rice for making maki rolls", "rice", "sushi"),
    _ask("en", "natural", "noodles for someone with coeliac disease", "noodles", "gluten_free"),
    _ask("en", "natural", "chocolate for diabetics", "chocolate", "sugar_free"),
    _ask("en", "natural", "chocolate without milk", "chocolate", "vegan"),
    _ask("en", "natural", "oil for salad dressing", "olive_oil", "extra_virgin"),
    _ask("en", "natural", "quick breakfast cereal I can make with boiling water", "cereal", "instant"),
    _ask("en", "natural", "hot sauce that is not too spicy for kids", "chili_sauce", "mild"),
    _ask("en", "keyword", "oolong tea", "tea", "oolong"),
    _ask("en", "keyword", "low-salt soy sauce", "soy_sauce", "low_salt"),
    _ask("en", "attribute", "extra virgin olive oil 1 L", "olive_oil", "extra_virgin bottle=1l"),
    _ask("en", "keyword", "unsalted nuts", "nuts", "unsalted"),
    _ask("en", "keyword", "gluten-free soy sauce", "soy_sauce", "gluten_free"),
    # English, by model number and accessories
    ModelQuery("en", "{hyphen}", "headphones", 1),
    ModelQuery("en", "{joined}", "keyboard", 2),
    ModelQuery("en", "{joined} monitor", "monitor", 0),
    ModelQuery("en", "{spaced} robot vacuum", "robot_vacuum", 1),
    ModelQuery("en", "case for {hyphen}", "headphones", 0, accessory="headphone_case"),
    ModelQuery("en", "new filter for {joined} air purifier", "air_purifier", 0, accessory="hepa_refill"),
    _ask("en", "accessory", "replacement cushions for over-ear headphones", "ear_pads"),
    _ask("en", "accessory", "new band for my smartwatch", "watch_strap"),
    _ask("en", "accessory", "remove limescale from a kettle", "descaler"),
    # Chinese, electronics
    _ask("zh", "keyword", "无线降噪耳机", "headphones", "anc wireless", "earbuds"),
    _ask("zh", "natural", "坐飞机用的隔音耳机", "headphones", "anc", "earbuds"),
    _ask("zh", "natural", "给孩子用不伤听力的耳机", "headphones", "kids_safe"),
    _ask("zh", "natural", "跑步不会掉的耳机", "earbuds", "sweatproof"),
    _ask("zh", "keyword", "睡眠耳塞", "earbuds", "sleep"),
    _ask("zh", "natural", "洗澡时可以听歌的防水音箱", "speaker", "waterproof"),
    _ask("zh", "attribute", "20000毫安快充充电宝", "power_bank", "fast capacity=20000"),
    _ask("zh", "natural", "可以吸在手机背面的充电宝", "power_bank", "magnetic"),
    _ask("zh", "keyword", "氮化镓充电器", "charger", "gan"),
    _ask("zh", "natural", "出国旅游用的转换插头", "charger", "travel"),
    _ask("zh", "natural", "宿舍用不吵人的键盘", "keyboard", "quiet"),
    _ask("zh", "attribute", "白色无线键盘", "keyboard", "wireless color=white"),
    _ask("zh", "natural", "手腕疼用什么鼠标", "mouse", "ergonomic"),
    _ask("zh", "keyword", "27英寸4K显示器", "monitor", "4k size=27"),
    _ask("zh", "natural", "能监测心率和睡眠的手表", "smartwatch", "heart sleep"),
    _ask("zh", "natural", "网课摄像头带补光", "webcam", "ring_light"),
    # Chinese, clothing
    _ask("zh", "keyword", "男款防水跑步鞋", "running_shoes", "waterproof gender=men"),
    _ask("zh", "natural", "脚宽的人穿的运动鞋", "running_shoes", "wide"),
    _ask("zh", "natural", "爬山不闷汗的冲锋衣", "rain_jacket", "breathable"),
    _ask("zh", "attribute", "女款长款羽绒服黑色", "down_jacket", "long gender=women color=black"),
    _ask("zh", "natural", "去哈尔滨穿的羽绒服", "down_jacket", "extreme"),
    _ask("zh", "keyword", "羊绒高领毛衣", "sweater", "cashmere turtleneck"),
    _ask("zh", "natural", "健身穿的速干短袖", "tshirt", "quick_dry"),
    _ask("zh", "natural", "出差不用熨的裤子", "trousers", "wrinkle_free"),
    _ask("zh", "keyword", "防臭袜子", "socks", "antibacterial"),
    _ask("zh", "natural", "能装笔记本电脑的背包", "backpack", "laptop"),
    _ask("zh", "keyword", "遮阳帽", "hat", "sun"),
    # Chinese, home
    _ask("zh", "natural", "手冲咖啡用的水壶", "kettle", "gooseneck"),
    _ask("zh", "natural", "煎蛋不粘的平底锅", "frying_pan", "nonstick"),
    _ask("zh", "natural", "剁排骨的刀", "knife", "bone"),
    _ask("zh", "natural", "新房装修除甲醛净化器", "air_purifier", "formaldehyde"),
    _ask("zh", "keyword", "扫拖一体扫地机器人", "robot_vacuum", "mop"),
    _ask("zh", "natural", "养猫家庭用的扫地机", "robot_vacuum", "pet"),
    _ask("zh", "natural", "孩子写作业用的护眼台灯", "desk_lamp", "eye_care"),
    _ask("zh", "keyword", "桑蚕丝被子", "duvet", "silk"),
    _ask("zh", "natural", "颈椎不好用什么枕头", "pillow", "neck"),
    _ask("zh", "keyword", "可折叠收纳箱带盖", "storage_box", "foldable lid"),
    _ask("zh", "natural", "小学生用的保温杯", "thermos", "kids"),
    # Chinese, groceries
    _ask("zh", "keyword", "低因咖啡豆", "coffee", "decaf"),
    _ask("zh", "natural", "送长辈的茶叶礼盒", "tea", "gift"),
    _ask("zh", "keyword", "乌龙茶", "tea", "oolong"),
    _ask("zh", "natural", "适合捏饭团的米", "rice", "sushi"),
    _ask("zh", "natural", "减肥吃的非油炸面", "noodles", "non_fried"),
    _ask("zh", "natural", "糖尿病人能吃的巧克力", "chocolate", "sugar_free"),
    _ask("zh", "keyword", "特级初榨橄榄油", "olive_oil", "extra_virgin"),
    _ask("zh", "natural", "红烧肉上色用的酱油", "soy_sauce", "dark"),
    _ask("zh", "keyword", "四川麻辣辣椒酱", "chili_sauce", "sichuan"),
    _ask("zh", "accessory", "净化器替换滤芯", "hepa_refill"),
    # Both languages at once
    _ask("mixed", "keyword", "Norvik 降噪耳机", "headphones", "anc brand=Norvik", "earbuds"),
    _ask("mixed", "keyword", "USB-C 显示器 一线连", "monitor", "usb_c"),
    _ask("mixed", "keyword", "GaN 充电头 100W", "charger", "gan power=100w"),
    _ask("mixed", "keyword", "RGB 机械键盘", "keyboard", "backlit"),
    _ask("mixed", "keyword", "HEPA 空气净化器", "air_purifier", "hepa"),
    _ask("mixed", "keyword", "GPS 运动手表", "smartwatch", "gps"),
    ModelQuery("mixed", "{joined} 耳机", "earbuds", 0),
    ModelQuery("mixed", "{hyphen} 电热水壶", "kettle", 0),
)
